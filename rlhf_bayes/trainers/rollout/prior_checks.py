"""Checks whether the policy without its adapters is the prior, before and during training."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn

from rlhf_bayes.lm.adapters import check_can_be_read_again, described, rewrites_base, trains_biases
from rlhf_bayes.lm.pretrained import has_whole_weights
from rlhf_bayes.lm.probe import disagreement, probe_log_probs, rounding

logger = logging.getLogger(__name__)


def check_adapters(model: Any, peft_config: Any) -> None:
    """
    Refuse adapters whose saved weights could not be read again, before the model is loaded.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The argument `model` of the trainer.
        peft_config (`PeftConfig`, *optional*):
            Configuration of the adapter that the trainer creates.

    Raises:
        ValueError: if there is such an adapter.
    """
    configs = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    for config in [*configs, *([] if peft_config is None else [peft_config])]:
        check_can_be_read_again(config, "the policy")


def probe_if_whole(model: nn.Module) -> Tensor | None:
    """The model's log-probs of a few rows (see [`probe_log_probs`]); None if its weights are sharded."""
    return probe_log_probs(model) if has_whole_weights(model) else None


def check_not_moved(policy: nn.Module, passed: Tensor | None, by: str) -> None:
    """
    Refuse a policy that was changed while the trainer was built.

    Args:
        policy (`nn.Module`):
            The policy now.
        passed (`Tensor`, *optional*):
            [`probe_if_whole`] of the policy when it was passed. None: nothing is checked.
        by (`str`):
            The operation that may have changed it, for the error.

    Raises:
        ValueError: if its log-probs have changed.
    """
    if passed is None:
        return
    moved = disagreement(probe_log_probs(policy), passed)
    if moved > rounding(policy):
        raise ValueError(
            f"`model` must compute the same after {by} as before, but its log-probs moved by {moved:.3g} nats a token "
            f"({described(policy)}): the run would start from another policy than the one that was passed. Merge the "
            "adapter into its base (`rlhf-bayes merge`), and pass that model with a new `peft_config`."
        )


def prior_within(policy: Any, switched: Any, passed: Tensor | None) -> str:
    """
    Which state of a PEFT policy is the prior, now and throughout training.

    Args:
        policy (`PeftModel`):
            The policy that the trainer has built.
        switched:
            Makes a context `switched(policy)` in which the policy is in the state that is assumed to be the prior.
        passed (`Tensor`, *optional*):
            [`probe_if_whole`] of the model when it was passed, which is the prior. None if weights are sharded, so
            that they cannot be run here; then the adapter's configuration decides.

    Returns:
        `"switched"`: the switched state is the prior and remains so. `"copy"`: the policy as built is the prior, and
        must be copied. `"switched copy"`: the switched state is the prior, but must be copied. `"none"`: neither is.
    """
    if passed is None:
        configs = policy.peft_config.values()
        answer = "none" if any(rewrites_base(config) or trains_biases(config) for config in configs) else "switched"
    else:
        answer = _by_probes(policy, switched, passed)
    # all processes must agree, and if FSDP loads weights once, only the first process has them
    return broadcast_object_list([answer])[0] if PartialState().num_processes > 1 else answer


def _by_probes(policy: Any, switched: Any, passed: Tensor) -> str:
    def probe() -> Tensor:
        with switched(policy):
            return probe_log_probs(policy)

    tolerance = rounding(policy)
    before = probe()
    is_prior = disagreement(before, passed) <= tolerance
    if is_prior:
        with _perturbed(policy):
            stays = disagreement(probe(), before) <= tolerance
        if stays:
            return "switched"
    if disagreement(probe_log_probs(policy), passed) <= tolerance:
        return "copy"
    return "switched copy" if is_prior else "none"


@contextmanager
def _perturbed(policy: nn.Module) -> Iterator[None]:
    """A context in which every trainable weight is changed by about its own size."""
    trained = [p for p in policy.parameters() if p.requires_grad and p.is_floating_point()]
    kept = [parameter.detach().clone() for parameter in trained]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in trained:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise * parameter.float().square().mean().sqrt().clamp(min=0.1).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(trained, kept, strict=True):
                parameter.copy_(weight)
