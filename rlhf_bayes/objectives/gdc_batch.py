"""Completions with the terms of a posterior: those of a batch, and those of all processes."""

from dataclasses import dataclass

from torch import Tensor

from rlhf_bayes.objectives.batch import Batch


@dataclass(frozen=True)
class GDCBatch(Batch):
    """Completions with the terms of the posterior: (B,), nats."""

    prompt_keys: Tensor
    """Integers, equal for completions of a prompt."""
    log_policy: Tensor
    """log π when the completion was drawn."""
    log_prior: Tensor
    """log π0."""
    log_proposal: Tensor
    """log q of the proposal that drew it."""
    log_likelihood: Tensor
    """The evidence; `-inf` where it forbids the completion, nan where none applies."""
    log_z: Tensor
    """log Z of the prompt, estimated from its other completions."""


@dataclass(frozen=True)
class GatheredRollout:
    """The rollouts of all processes: (B_global,) fp64, nats."""

    prompt_keys: Tensor
    log_policy: Tensor
    log_prior: Tensor
    log_proposal: Tensor
    log_likelihood: Tensor
    kls: Tensor
    """Estimate of KL(π‖π0) from each completion."""
