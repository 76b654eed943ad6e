"""Proposals other than the current policy, from which completions are drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from rlhf_bayes.numerics.log_weights import MIN_IMPORTANCE_ESS


@final
class Snapshot:
    """
    The policy at an earlier time: a copy of its trainable weights, those of an adapter or of the whole model.

    Args:
        policy (`nn.Module`):
            The unwrapped policy, whose weights are not sharded.
    """

    def __init__(self, policy: nn.Module):
        self.weights = {
            name: parameter.detach().clone()
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad
        }

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[None]:
        """A context in which the policy has these weights. Run it without gradient."""
        self._swap(policy)
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap(policy)

    def _swap(self, policy: nn.Module) -> None:
        parameters = dict(policy.named_parameters())
        for name, weight in self.weights.items():
            self.weights[name], parameters[name].data = parameters[name].data, weight.to(parameters[name].device)


@final
class Comparison:
    r"""
    Whether the policy is closer to the posterior than the proposal, estimated from the proposal's completions.

        KL(p‖π) − KL(p‖q) = E_p[log q − log π] ≈ Σ w·(log q − log π) / Σ w,    w = p/q

    The sums run over all rollouts since the proposal was last replaced. The mean is therefore over the policies of
    these rollouts, and lags behind the current policy, which delays a replacement but does not cause a wrong one.

    Source: the rule of Khalifa et al. 2021, arXiv 2012.11635, Algorithm 1 (KL-adaptive DPG), with an error bar.
    """

    min_ess = MIN_IMPORTANCE_ESS
    standard_errors = 2.0

    def __init__(self):
        # Σ w, Σ w², Σ w·d, Σ w²·d, Σ w²·d²
        self.sums = torch.zeros(5, dtype=torch.float64)

    def add(self, log_target: Tensor, log_policy: Tensor, log_proposal: Tensor) -> None:
        """
        Add completions that were drawn from the proposal.

        Args:
            log_target, log_policy, log_proposal (`Tensor` (B,)):
                log p, log π and log q, nats; log p nan for one to be left out.
        """
        kept = ~log_target.isnan()
        log_target, log_policy, log_proposal = (x[kept].double().cpu() for x in (log_target, log_policy, log_proposal))
        weights, differences = (log_target - log_proposal).exp(), log_proposal - log_policy
        squares = weights.square()
        terms = (weights, squares, weights * differences, squares * differences, squares * differences.square())
        self.sums += torch.stack([term.sum() for term in terms])

    @property
    def policy_is_better(self) -> bool:
        """Whether the policy is better by more than noise, judged from enough completions."""
        w, w2, wd, w2d, w2d2 = self.sums.tolist()
        if w == 0 or w**2 / w2 < self.min_ess:
            return False
        mean = wd / w
        variance = max(w2d2 - 2 * mean * w2d + mean**2 * w2, 0.0) / w**2
        return mean + self.standard_errors * variance**0.5 < 0


def check_proposal(proposal: str, prior_samples: int, engine: str | None) -> None:
    """
    Refuse a proposal from which the generation engine cannot draw.

    Args:
        proposal (`str`), prior_samples (`int`):
            Fields of the configuration.
        engine (`str`, *optional*):
            Name of an engine that draws only from the policy.

    Raises:
        ValueError: if there is such an engine, and completions must come from something else than the policy.
    """
    for name, value, allowed in (("proposal", proposal, "policy"), ("prior_samples", prior_samples, 0)):
        if engine is not None and value != allowed:
            raise ValueError(
                f"`{name}` must be {allowed!r} with {engine}, got {value!r}: completions can be drawn from the policy "
                "only. Leave it out."
            )
