"""The `World` of an objective whose training loop is a Trainer."""

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from rlhf_bayes.objectives import Batch

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer


@final
class TrainerWorld:
    """
    The [`~rlhf_bayes.objectives.World`] of accelerate's processes, and of a Trainer's progress and metrics.

    Args:
        trainer (`RolloutTrainer`):
            The trainer, which is the training loop.
    """

    def __init__(self, trainer: "RolloutTrainer"):
        self._trainer = trainer

    @property
    def training(self) -> bool:
        """Whether the trainer is training rather than evaluating."""
        return self._trainer.mode == "train"

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self._trainer.state.global_step

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self._trainer.state.max_steps

    @property
    def process_index(self) -> int:
        """Index of this process."""
        return self._trainer.accelerator.process_index

    @property
    def num_processes(self) -> int:
        """Number of processes of the launch."""
        return self._trainer.accelerator.num_processes

    def gather(self, rows: Tensor) -> Tensor:
        """(B, …) of each process -> (B · num_processes, …)."""
        return self._trainer.accelerator.gather(rows)

    def gather_tokens(self, rows: Tensor) -> Tensor:
        """`gather` after padding the last dimension with 0 to the longest of all processes."""
        padded = self._trainer.accelerator.pad_across_processes(rows, dim=rows.dim() - 1)
        return self._trainer.accelerator.gather(padded.contiguous())

    def reduce(self, sums: Tensor) -> Tensor:
        """The sum over processes."""
        return self._trainer.accelerator.reduce(sums, reduction="sum")

    def log(self, name: str, value: float) -> None:
        """Add a value to the trainer's metrics, and show it to its alarms and to its learning rate."""
        self._trainer.log_metric(name, value)
        if self.training:
            self._trainer.alarms.note(name, value)
            self._trainer.step_size.note(name, value)

    def log_probs(self, batch: Batch) -> Tensor:
        """log π of the completions, (B,), by a forward of the trainer's model without gradient."""
        with torch.no_grad(), self._trainer.accelerator.autocast():
            return self._trainer.score(self._trainer.model, batch).log_probs.sum(-1)
