"""What completions are drawn from, where it is not the policy as it is now."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from rlhf_bayes.numerics.log_weights import MIN_IMPORTANCE_ESS


@final
class Snapshot:
    """
    The policy as it once was: a copy of its trainable weights, an adapter's or the whole model's.

    Args:
        policy (`nn.Module`):
            The plain policy, not sharded.
    """

    def __init__(self, policy: nn.Module):
        self.weights = {
            name: parameter.detach().clone()
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad
        }

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[None]:
        """Within: the policy has these weights. Run without gradient."""
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
    Whether the policy has come closer to the posterior than the proposal, by the proposal's own completions.

        KL(p‖π) − KL(p‖q) = E_p[log q − log π] ≈ Σ w·(log q − log π) / Σ w,    w = p/q

    It adds up over rollouts since the proposal was replaced, so that the mean is over the policies since: it lags
    behind the policy, on the safe side.

    Source: the rule of Khalifa et al. 2021, arXiv 2012.11635, Algorithm 1 (KL-adaptive DPG), with an error bar.
    """

    min_ess = MIN_IMPORTANCE_ESS
    standard_errors = 2.0

    def __init__(self):
        # Σ w, Σ w², Σ w·d, Σ w²·d, Σ w²·d²
        self.sums = torch.zeros(5, dtype=torch.float64)

    def add(self, log_target: Tensor, log_policy: Tensor, log_proposal: Tensor) -> None:
        """
        Completions drawn from the proposal.

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
        """Beyond noise, and by enough completions to say so."""
        w, w2, wd, w2d, w2d2 = self.sums.tolist()
        if w == 0 or w**2 / w2 < self.min_ess:
            return False
        mean = wd / w
        variance = max(w2d2 - 2 * mean * w2d + mean**2 * w2, 0.0) / w**2
        return mean + self.standard_errors * variance**0.5 < 0


def check_proposal(proposal: str, prior_samples: int, engine: str | None) -> None:
    """
    Refuse what an engine cannot draw from.

    Args:
        proposal (`str`), prior_samples (`int`):
            Those of the configuration.
        engine (`str`, *optional*):
            What draws from the policy only, by name.

    Raises:
        ValueError: if there is one, and something is to be drawn that is not the policy's.
    """
    for name, value, allowed in (("proposal", proposal, "policy"), ("prior_samples", prior_samples, 0)):
        if engine is not None and value != allowed:
            raise ValueError(
                f"`{name}` must be {allowed!r} with {engine}, got {value!r}: completions can be drawn from the policy "
                "only. Leave it out."
            )
