"""The rewards of several models, made one: how the members of an ensemble combine at inverse temperature 1/β."""

import math

import torch
from torch import Tensor

POOLING_RULES = ("mean", "pessimistic", "mean_minus_variance", "min", "marginal")


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
    beta, penalty = _checked_scales(rule, beta, penalty)
    rewards = _checked_members(member_rewards)  # (K, ...)
    if rule == "min":
        return rewards.amin(0)
    mean = rewards.mean(0)  # (...)
    if beta is not None:
        sign = -1 if rule == "pessimistic" else 1
        return sign * beta * ((sign * rewards / beta).logsumexp(0) - math.log(len(rewards)))
    if penalty is not None:
        # where: the variance of -inf is nan
        return torch.where(mean == -torch.inf, mean, mean - penalty * rewards.var(0, correction=0))
    return mean


def pool_centered(
    member_rewards: Tensor, centers: Tensor, rule: str, beta: float | None = None, penalty: float | None = None
) -> Tensor:
    """
    [`pool`] once each member has the same zero: `pool_k[r_k − m_k] + 1/K Σ_k m_k`.

    Args:
        member_rewards (`torch.Tensor`): r_k (K, ...).
        centers (`torch.Tensor`): m_k (K, ...) or broadcast to it, each member's mean under the prior.
        rule, beta, penalty: as for [`pool`].

    Returns:
        `torch.Tensor`: pooled reward (...).

    Raises:
        ValueError: as [`pool`].
    """
    return pool(member_rewards - centers, rule, beta, penalty) + centers.mean(0)


def uses_beta(rule: str, penalty: float | None = None) -> bool:
    """Whether `pool` wants a `beta` for this rule, given its `penalty`."""
    return rule in ("pessimistic", "marginal") or (rule == "mean_minus_variance" and penalty is None)


def _checked_scales(rule: str, beta: float | None, penalty: float | None) -> tuple[float | None, float | None]:
    """What the rule uses: β for the log-means, the penalty for the variance, neither otherwise."""
    if rule not in POOLING_RULES:
        raise ValueError(f"`rule` must be one of {', '.join(POOLING_RULES)}, got {rule!r}.")
    if beta is not None and not 0 < beta < math.inf:
        raise ValueError(f"`beta` must be positive and finite, got {beta}: it is the reward that a nat is worth.")
    if penalty is not None and not 0 <= penalty < math.inf:
        raise ValueError(
            f"`penalty` must be finite and not negative, got {penalty}: it is subtracted. Use the rule 'marginal' to "
            "prefer what members disagree on."
        )
    if penalty is not None and rule != "mean_minus_variance":
        raise ValueError(
            f"`penalty` must be left out with the rule '{rule}', which has no variance to weigh, got {penalty}. Use "
            "'mean_minus_variance'."
        )
    if rule in ("pessimistic", "marginal"):
        if beta is None:
            raise ValueError(f"`beta` must be given for the rule '{rule}', got None: it is the β of the posterior.")
        return beta, None
    if rule == "mean_minus_variance":
        if (beta is None) == (penalty is None):
            raise ValueError(
                "Either `penalty` or `beta` (for a penalty of 1/(2 beta)) must be given for the rule "
                f"'mean_minus_variance', got {'neither' if beta is None else 'both'}. Pass one of them."
            )
        return None, penalty if beta is None else 1 / (2 * beta)
    if beta is not None:
        raise ValueError(f"`beta` must be left out with the rule '{rule}', which does not depend on it, got {beta}.")
    return None, None


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
