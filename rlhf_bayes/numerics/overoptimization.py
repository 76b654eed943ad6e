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
    never_falls: bool = False
    """Whether the reward is the one that is maximised, which no further optimisation lowers: beyond the top of its
    curve the law is constant."""

    @property
    def top(self) -> float:
        """d at which the curve is highest; infinite where it has no top."""
        if self.beta <= 0:
            return math.inf
        return math.exp(self.alpha / self.beta - 1) if self.law == "rl" else max(self.alpha / (2 * self.beta), 0.0)

    def __call__(self, d: float) -> float:
        """Reward at d ≥ 0."""
        d = min(d, self.top) if self.never_falls else d
        if d == 0:
            return self.start
        return self.start + d * (self.alpha - self.beta * (math.log(d) if self.law == "rl" else d))

    def __str__(self) -> str:
        inner = "log d" if self.law == "rl" else "d"
        sign = "−" if self.beta >= 0 else "+"
        flat = f", constant from d = {self.top:.2f} on" if self.never_falls and math.isfinite(self.top) else ""
        law = f"{self.start:.2f} + d·({self.alpha:.2f} {sign} {abs(self.beta):.2f}·{inner})"
        return (law + flat).replace("-", "−")


def fit_reward_law(
    root_kl: Sequence[float],
    reward: Sequence[float],
    law: Literal["rl", "best_of_n"],
    start: float | None = None,
    never_falls: bool = False,
) -> RewardLaw | None:
    r"""
    Least squares of reward on d = √KL.

        R_RL(d) = R_0 + d·(α − β·log d),    R_BoN(d) = R_0 + d·(α − β·d)

    The points of one training run are not independent, so no standard error is given.

    The laws are about a gold reward, which falls again where a proxy of it is over-optimised. The reward that is
    maximised itself does not: the best of more completions is never worse. With `never_falls` the slope is held at 0
    or above up to the largest d, and the law is constant from its top on.

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
        never_falls (`bool`, *optional*, defaults to `False`):
            Whether the reward is the one that is maximised.

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
    # the slope at the largest d is α − β·steepness
    steepness = 1 + math.log(d.max()) if law == "rl" else 2 * d.max()
    if never_falls and coefficients[0] < coefficients[1] * steepness:
        coefficients = _flat_at_the_end(design, target, steepness)
    residual = float(np.sqrt(np.mean((design @ coefficients - target) ** 2)))
    alpha, beta, *fitted = (float(coefficient) for coefficient in coefficients)
    return RewardLaw(law, fitted[0] if start is None else start, alpha, beta, residual, never_falls)


def _flat_at_the_end(design: np.ndarray, target: np.ndarray, steepness: float) -> np.ndarray:
    """Least squares where α = β·steepness, so that the slope at the largest d is 0."""
    reduced = np.column_stack([steepness * design[:, 0] + design[:, 1], design[:, 2:]])  # (N, 1 or 2)
    beta, *others = np.linalg.lstsq(reduced, target, rcond=None)[0]
    return np.array([steepness * beta, beta, *others])
