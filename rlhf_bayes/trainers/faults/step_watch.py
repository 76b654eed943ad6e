"""Checks around each optimizer step: whether its gradient is finite, and whether the run must end."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

logger = logging.getLogger(__name__)


class TerminatedError(Exception):
    """SIGTERM came while the training waited for something, and `save_on_sigterm` is set."""


@final
class StepWatch(TrainerCallback):
    """
    Skips optimizer steps whose gradient is not finite; ends a training between two steps, with a checkpoint.

    Args:
        trainer (`Trainer`):
            Whose `args` are a [`FaultConfig`].

    Attributes:
        skipped_in_a_row (`int`): how many of the latest optimizer steps, without a gap, were skipped.
        terminated (`bool`): whether SIGTERM ended the training.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.skipped_in_a_row = 0
        self.terminated = False
        self._sigterm = False

    @property
    def gave_up(self) -> bool:
        """Whether too many gradients in a row were not finite."""
        return self.skipped_in_a_row >= self.trainer.args.max_nonfinite_steps

    def check_waiting(self) -> None:
        """
        Raise an error if SIGTERM came. What waits calls it in all processes together, a few times a second.

        Raises:
            TerminatedError: if SIGTERM came in any process, and `save_on_sigterm` is set.
        """
        if self.trainer.args.save_on_sigterm and self._anywhere(self._sigterm):
            self.terminated = True
            raise TerminatedError("SIGTERM came while the training waited.")

    def check_gradients(self) -> None:
        """
        Raise the error that ended the training, if there is one. Call it after the training.

        Raises:
            FloatingPointError: if the training ended because too many gradients in a row were not finite.
        """
        if self.gave_up:
            raise FloatingPointError(
                f"The gradients of {self.skipped_in_a_row} optimizer steps in a row were not finite "
                f"(`max_nonfinite_steps` = {self.trainer.args.max_nonfinite_steps}). Lower the learning rate, look "
                "for rewards of an extreme size, or use a precision with a larger range."
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which SIGTERM ends the training after the current step, if `save_on_sigterm` is set."""
        if not self.trainer.args.save_on_sigterm:
            yield
            return
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "`save_on_sigterm` must be False outside of the main thread, since only the main thread receives "
                "signals. Train in the main thread."
            )
        handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self._sigterm = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._scales_the_loss:
            return
        parameters = [p for group in self.trainer.optimizer.param_groups for p in group["params"]]
        if self.trainer.is_deepspeed_enabled:
            skips = self._deepspeed_skipped(state.global_step + 1)
        else:
            skips = self._anywhere(not all_finite([p.grad for p in parameters if p.grad is not None]))
        self.trainer.log_metric("nonfinite_steps", float(skips))
        if not skips:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        for parameter in parameters:
            parameter.grad = None
        logger.warning(
            f"The gradient of optimizer step {state.global_step + 1} is not finite: the step is skipped "
            f"({self.skipped_in_a_row} in a row; training stops at {args.max_nonfinite_steps})."
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.terminated = args.save_on_sigterm and self._anywhere(self._sigterm)
        if self.terminated or self.gave_up:
            control.should_training_stop = True
            control.should_save |= self.terminated or args.save_strategy != SaveStrategy.NO

    @property
    def _scales_the_loss(self) -> bool:
        # under fp16 DeepSpeed skips steps itself while it searches for a loss scale
        fp16 = self.trainer.is_deepspeed_enabled and self.trainer.accelerator.mixed_precision == "fp16"
        return fp16 or self.trainer.accelerator.scaler is not None

    def _deepspeed_skipped(self, step: int) -> bool:
        # by now DeepSpeed's engine has taken the step, or has found itself that the gradient is not finite
        engine = self.trainer.model_wrapped
        if not engine.was_step_applied():
            return True
        norm = engine.get_global_grad_norm()
        if norm is not None and not torch.as_tensor(norm).isfinite():
            raise FloatingPointError(
                f"The gradient of optimizer step {step} is not finite, and DeepSpeed has taken the step: the weights "
                "cannot be used."
            )
        return False

    def _anywhere(self, flag: bool) -> bool:
        # all processes must decide alike: one that stops alone would leave the others waiting
        accelerator = self.trainer.accelerator
        if accelerator.distributed_type == DistributedType.NO:
            return flag
        return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum").item() > 0


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether all entries are finite. Of a sharded tensor, only the part that this process holds is checked."""
    tensors = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor)
    # the largest entry is nan if any entry is, and unlike a sum of squares it cannot overflow
    return all(
        bool(torch.stack([norm.float() for norm in torch._foreach_norm(group, torch.inf)]).isfinite().all())
        for group in by_device.values()
    )
