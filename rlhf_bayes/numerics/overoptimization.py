"""Fits the two laws of Gao, Schulman & Hilton 2023: how reward depends on the distance from the prior."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

_MIN_POINTS = 5


class RewardLaw(NamedTuple):
    """R(d) = start + d·(α − β·log d) for RL, start + d·(α − β·d) for the best of n; d = √KL(policy‖prior) in √nats."""

    law: Literal["rl", "best_of_n"]
    start: float
    """Reward of the prior, where d = 0."""
    alpha: float
    """Reward gained per √nat near the prior."""
    beta: float
    """How fast this gain falls with d. It is not the β of the posterior."""
    residual: float
    """Root mean square of the residuals, in units of reward."""

    def __call__(self, d: float) -> float:
        """Reward at d ≥ 0."""
        if d == 0:
            return self.start
        return self.start + d * (self.alpha - self.beta * (math.log(d) if self.law == "rl" else d))

    def __str__(self) -> str:
        inner = "log d" if self.law == "rl" else "d"
        sign = "−" if self.beta >= 0 else "+"
        return f"{self.start:.2f} + d·({self.alpha:.2f} {sign} {abs(self.beta):.2f}·{inner})".replace("-", "−")


def fit_reward_law(
    root_kl: Sequence[float], reward: Sequence[float], law: Literal["rl", "best_of_n"], start: float | None = None
) -> RewardLaw | None:
    r"""
    Least squares of reward on d = √KL.

        R_RL(d) = R_0 + d·(α − β·log d),    R_BoN(d) = R_0 + d·(α − β·d)

    The points of one training run are not independent, so no standard error is given.

    Args:
        root_kl (`Sequence[float]`):
            d ≥ 0 of each point, in √nats.
        reward (`Sequence[float]`):
            Reward of each point.
        law (`"rl"` or `"best_of_n"`):
            Which of the two laws to fit.
        start (`float`, *optional*):
            R_0, the reward of the prior, from which the paper measures. Default: it is fitted too, which is imprecise
            where no point is near d = 0.

    Returns:
        [`RewardLaw`], or None where there are fewer than 5 different d, or all rewards are equal.

    Raises:
        ValueError: if the lengths differ, a value is not finite, a d is negative, or the law is unknown.

    Source: Gao, Schulman & Hilton 2023, arXiv 2210.10760, equation 1.
    """
    if law not in ("rl", "best_of_n"):
        raise ValueError(f'`law` must be "rl" or "best_of_n", got {law!r}.')
    if len(root_kl) != len(reward):
        raise ValueError(
            f"`root_kl` and `reward` must have one entry a point, got {len(root_kl)} and {len(reward)}. Keep the "
            "points at which both were measured."
        )
    d, r = np.asarray(root_kl, dtype=float), np.asarray(reward, dtype=float)  # (N,), (N,)
    if not (np.isfinite(d).all() and np.isfinite(r).all()) or (d < 0).any():
        raise ValueError(
            "`root_kl` must be finite and not negative and `reward` finite: clamp estimates of the KL at 0, and leave "
            "out points without a reward."
        )
    if len(np.unique(d)) < _MIN_POINTS or np.ptp(r) == 0:
        return None
    # d·log d goes to 0 with d
    curved = d * np.log(np.where(d > 0, d, 1.0)) if law == "rl" else d * d
    design = np.stack([d, -curved, np.ones_like(d)][: 3 if start is None else 2], axis=1)  # (N, 3 or 2)
    target = r if start is None else r - start
    coefficients, _, rank, _ = np.linalg.lstsq(design, target, rcond=None)
    if rank < design.shape[1]:
        return None
    residual = float(np.sqrt(np.mean((design @ coefficients - target) ** 2)))
    alpha, beta, *fitted = (float(coefficient) for coefficient in coefficients)
    return RewardLaw(law, fitted[0] if start is None else start, alpha, beta, residual)
