"""Rules that pool the rewards of an ensemble's members into one reward."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PoolingRule:
    """A rule that pools the rewards of K members."""

    formula: str
    """The formula of the pooled reward, for the tables of the docs."""
    help: str
    """The effect on the members' posteriors, in one line, for `--help` and the tables of the docs."""
    pool: Callable[[Tensor, float], Tensor]
    """Rewards (K, ...), `-inf` where a member forbids, and the rule's scale -> pooled reward (...)."""
    scale: Literal["none", "beta", "penalty"]
    """The kind of scale: none (1 is passed), β, or the weight of the variance, whose default is 1/(2β)."""
    optimism: Literal[-1, 0, 1]
    """Sign of the pooled reward minus the mean, where members differ."""


def _log_mean(rewards: Tensor, beta: float) -> Tensor:
    """`β log 1/K Σ_k exp(r_k/β)`, for β of either sign: (K, ...) -> (...)."""
    return beta * ((rewards / beta).logsumexp(0) - math.log(len(rewards)))


def _mean_minus_variance(rewards: Tensor, penalty: float) -> Tensor:
    mean = rewards.mean(0)
    # torch.where, since the variance of −inf is nan
    return torch.where(mean == -torch.inf, mean, mean - penalty * rewards.var(0, correction=0))


POOLING_RULES: dict[str, PoolingRule] = {
    "mean": PoolingRule(
        formula="mean of r_k",
        help="the members' posteriors, multiplied",
        pool=lambda rewards, _: rewards.mean(0),
        scale="none",
        optimism=0,
    ),
    "pessimistic": PoolingRule(
        formula="−β·log mean exp(−r_k/β)",
        help="treads lightly where the members differ",
        pool=lambda rewards, beta: _log_mean(rewards, -beta),
        scale="beta",
        optimism=-1,
    ),
    "mean_minus_variance": PoolingRule(
        formula="mean − λ·variance",
        help="the pessimistic rule to second order, for λ = 1/(2β)",
        pool=_mean_minus_variance,
        scale="penalty",
        optimism=-1,
    ),
    "min": PoolingRule(
        formula="min r_k",
        help="the worst member: the pessimistic rule for β → 0",
        pool=lambda rewards, _: rewards.amin(0),
        scale="none",
        optimism=-1,
    ),
    "marginal": PoolingRule(
        formula="β·log mean exp(r_k/β)",
        help="the members' posteriors added, each weighed by its Z: optimistic",
        pool=lambda rewards, beta: _log_mean(rewards, beta),
        scale="beta",
        optimism=1,
    ),
}
"""Name -> record."""


def pool(member_rewards: Tensor, rule: str, beta: float | None = None, penalty: float | None = None) -> Tensor:
    """
    One reward from K members' rewards r_k:

        mean                    1/K Σ_k r_k                      the geometric pool of the members' posteriors
        pessimistic             −β log 1/K Σ_k exp(−r_k/β)
        mean_minus_variance     mean − penalty · variance        the former to second order, for penalty = 1/(2β)
        min                     min_k r_k                        pessimistic as β → 0
        marginal                β log 1/K Σ_k exp(r_k/β)         optimistic: the Z_k-weighted mixture of posteriors

    min ≤ pessimistic ≤ mean ≤ marginal. Rewards of a Bradley–Terry model are defined up to a constant per prompt, and
    every rule but the mean changes with a member's constant: subtract each member's mean over the prior first.

    Args:
        member_rewards (`torch.Tensor`): r_k (K, ...), members first; `-inf` where a member forbids the completion.
        rule (`str`): one of `POOLING_RULES`.
        beta (`float`, *optional*): β, units of reward per nat. Needed for `pessimistic` and `marginal`; gives the
            default of `penalty` for `mean_minus_variance`.
        penalty (`float`, *optional*): weight of the (population) variance, per unit of reward, 0 or more; for
            `mean_minus_variance` only, in place of `beta`.

    Returns:
        `torch.Tensor`: pooled reward (...), fp32 or better.

    Raises:
        ValueError: if `rule` is unknown, there are no members, a reward is nan or `+inf`, or `beta` or `penalty` is
            missing, out of range, or of no use to the rule.

    Source: Coste et al. 2024, arXiv 2310.02743: `min` ("worst-case"), `mean_minus_variance` ("uncertainty-weighted");
    `pessimistic` and `marginal` as the two signs of ±β log E exp(±r/β): arXiv 2606.09073.
    """
    scale = _checked_scale(rule, beta, penalty)
    return POOLING_RULES[rule].pool(_checked_members(member_rewards), scale)


def pool_centered(
    member_rewards: Tensor, centers: Tensor, rule: str, beta: float | None = None, penalty: float | None = None
) -> Tensor:
    """
    [`pool`] of centered members, plus the mean of the centers: `pool_k[r_k − m_k] + 1/K Σ_k m_k`.

    Args:
        member_rewards (`torch.Tensor`): r_k (K, ...).
        centers (`torch.Tensor`): m_k (K, ...) or broadcast to it, each member's mean under the prior.
        rule, beta, penalty: as in [`pool`].

    Returns:
        `torch.Tensor`: pooled reward (...).

    Raises:
        ValueError: as [`pool`].
    """
    return pool(member_rewards - centers, rule, beta, penalty) + centers.mean(0)


def pooling_rule(name: str) -> PoolingRule:
    """
    The record of a rule.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in POOLING_RULES:
        raise ValueError(f"`rule` must be one of {', '.join(POOLING_RULES)}, got {name!r}.")
    return POOLING_RULES[name]


def rules_help() -> str:
    """A text on all rules, for `--help`."""
    return "; ".join(f"'{name}': {rule.formula}, {rule.help}" for name, rule in POOLING_RULES.items()) + "."


def uses_beta(rule: str, penalty: float | None = None) -> bool:
    """
    Whether [`pool`] needs a `beta` for this rule, given its `penalty`.

    Raises:
        ValueError: if the rule is unknown.
    """
    scale = pooling_rule(rule).scale
    return scale == "beta" or (scale == "penalty" and penalty is None)


def _names(wanted: Callable[[PoolingRule], bool]) -> str:
    return " or ".join(f"'{name}'" for name, record in POOLING_RULES.items() if wanted(record))


def _checked_scale(rule: str, beta: float | None, penalty: float | None) -> float:
    """β for the log-means, the penalty for the variance; 1 for rules that have no scale."""
    record = pooling_rule(rule)
    if beta is not None and not 0 < beta < math.inf:
        raise ValueError(f"`beta` must be positive and finite, got {beta}: it is the reward that a nat is worth.")
    if penalty is not None and not 0 <= penalty < math.inf:
        raise ValueError(
            f"`penalty` must be finite and not negative, got {penalty}: it is subtracted. Use the rule "
            f"{_names(lambda other: other.optimism > 0)} to prefer what members disagree on."
        )
    if penalty is not None and record.scale != "penalty":
        raise ValueError(
            f"`penalty` must be left out with the rule '{rule}', which has no variance to weigh, got {penalty}. Use "
            f"{_names(lambda other: other.scale == 'penalty')}."
        )
    if record.scale == "none":
        if beta is not None:
            raise ValueError(
                f"`beta` must be left out with the rule '{rule}', which does not depend on it, got {beta}."
            )
        return 1.0
    if record.scale == "beta":
        if beta is None:
            raise ValueError(f"`beta` must be given for the rule '{rule}', got None: it is the β of the posterior.")
        return beta
    if beta is not None and penalty is None:
        return 1 / (2 * beta)
    if penalty is not None and beta is None:
        return penalty
    raise ValueError(
        "Either `penalty` or `beta` (for a penalty of 1/(2 beta)) must be given for the rule "
        f"'{rule}', got {'neither' if beta is None else 'both'}. Pass one of them."
    )


def _checked_members(member_rewards: Tensor) -> Tensor:
    if member_rewards.dim() == 0 or len(member_rewards) == 0:
        raise ValueError(
            f"`member_rewards` must be (K, ...) with K > 0, got shape {tuple(member_rewards.shape)}: members first."
        )
    wrong = member_rewards.isnan() | (member_rewards == torch.inf)  # (K, ...)
    if wrong.any():
        member = wrong.flatten(1).any(1).nonzero()[0].item() if wrong.dim() > 1 else wrong.nonzero()[0].item()
        raise ValueError(
            f"`member_rewards` must be finite, or -inf for a forbidden completion; got nan or +inf from member "
            f"{member}."
        )
    return member_rewards if member_rewards.dtype == torch.float64 else member_rewards.float()
