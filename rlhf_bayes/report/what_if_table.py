"""What draws of the prior, or of a store, say of the posteriors of other β, without training."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf_bayes.numerics import best_of_n_kl, expected_best_of_n, what_if

_FACTORS = (8, 4, 2, 1, 1 / 2, 1 / 4, 1 / 8)


def betas_around(beta: float) -> list[float]:
    """Seven values of β, from 8·β down to β/8, each half the one before."""
    return [beta * factor for factor in _FACTORS]


def what_if_of(
    rewards: Tensor, betas: Sequence[float], log_ratios: Tensor | None = None
) -> dict[str, list[dict[str, Any]]]:
    """
    `what_if`, the posterior at each β, and `best_of_n`, for `sampling.json`.

    Args:
        rewards (`torch.Tensor`):
            (P, n): rewards of the prior's completions, in the reward's own units.
        betas (`Sequence[float]`):
            Positive values of β, in units of reward per nat of evidence; empty where there is no posterior.
        log_ratios (`torch.Tensor`, *optional*):
            (P, n), nats: log π0 − log q of completions that another proposal drew. There is no `best_of_n` then.
    """
    rewards = rewards.double()
    found: dict[str, list[dict[str, Any]]] = {
        "what_if": [row._asdict() for row in what_if(rewards, betas, log_ratios)]
    }
    of_prior = log_ratios is None or not bool(log_ratios.any())
    if of_prior and bool(rewards.isfinite().all()):  # the best of n is not defined where a completion is forbidden
        ns = [2**power for power in range(rewards.size(1).bit_length())]
        means = expected_best_of_n(rewards, rewards, ns).tolist()
        found["best_of_n"] = [
            {"n": n, "kl_to_prior": sum(float(best_of_n_kl(row, n)) for row in rewards) / len(rewards), "reward": mean}
            for n, mean in zip(ns, means, strict=True)
        ]
    return found
