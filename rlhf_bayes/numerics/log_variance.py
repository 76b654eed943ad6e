"""The log-variance loss: how far log π − log π0 − log_likelihood is from being the same for a prompt's completions."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_bayes.numerics.groups import grouped, huber_centre


class LogVarianceCentres(NamedTuple):
    """What [`log_variance_loss`] needs to know of a completion's siblings. Constants."""

    centre: Tensor
    """(B,), in nats: what the completion's deviation is taken from, an estimate of −log Z."""
    scale: Tensor
    """(B,): n/(n − 1) for the n completions of a prompt, 0 for one alone, which has no spread; with a given log Z 1,
    or 0 where it is not known."""


def log_variance_centres(
    log_policy: Tensor,
    log_prior: Tensor,
    log_likelihood: Tensor,
    groups: Tensor,
    huber_delta: float | None = None,
    log_z: Tensor | None = None,
) -> LogVarianceCentres:
    """
    Centre of `d = log π − log π0 − log_likelihood` over the completions of each prompt, that of [`log_variance_loss`].

    Apart from the loss, so that a prompt's completions may be spread over micro-batches: the loss has no gradient
    through its centre, whose derivative is 0.

    Args:
        log_policy (`torch.Tensor`): log π (B,), in nats, as the policy is now.
        log_prior (`torch.Tensor`): log π0 (B,), in nats.
        log_likelihood (`torch.Tensor`): (B,), in nats; `-inf` for a forbidden completion, nan for one to be left out.
        groups (`torch.Tensor`): integers (B,), equal for completions of the same prompt, whenever and by whatever
            policy they were drawn.
        huber_delta (`float`, *optional*): as for the loss. The centre is then Huber's location, which an outlier
            hardly moves, in place of the mean.
        log_z (`torch.Tensor`, *optional*): log Z of the prompt of each completion (B,), in nats; nan or `-inf` where
            it is not known. The centre is then −log Z, which the loss of forbidden completions needs.

    Returns:
        `LogVarianceCentres`: of each completion.

    Raises:
        ValueError: if the shapes differ, `groups` is not integers, a log-probability is not finite, `huber_delta` is
            not positive, or a completion is forbidden and `log_z` is not given.

    Source: as [`log_variance_loss`].
    """
    _check_options(huber_delta)
    difference = _differences(log_policy.detach(), log_prior, log_likelihood)  # (B,)
    if groups.shape != difference.shape:
        raise ValueError(f"`groups` must be {tuple(difference.shape)}, got {tuple(groups.shape)}: one a completion.")
    if log_z is not None:
        known = log_z.isfinite()
        centre = torch.where(known, -log_z, 0.0).to(difference.dtype)
        return LogVarianceCentres(centre, known.to(difference.dtype))
    if bool((difference == torch.inf).any()):
        raise ValueError(
            "`log_z` must be given where completions are forbidden: the mean over those that are not says nothing of "
            "how much mass the others must lose."
        )
    layout = grouped(groups)
    table = layout.table(difference.double(), torch.nan)  # (G, M)
    counts = (~table.isnan()).sum(-1, keepdim=True)  # (G, 1)
    scale = torch.where(counts > 1, counts / (counts - 1).clamp(min=1), 0.0)
    centre = layout.rows(huber_centre(table, huber_delta))  # (B,)
    return LogVarianceCentres(centre.to(difference.dtype), layout.rows(scale).to(difference.dtype))


def log_variance_loss(
    log_policy: Tensor,
    log_prior: Tensor,
    log_likelihood: Tensor,
    centres: LogVarianceCentres,
    huber_delta: float | None = None,
    forbidden_gap: float = 1.0,
) -> Tensor:
    r"""
    Log-variance loss of each completion, wherever it was drawn from: no importance weights.

        ½·n/(n−1)·(d_i − d̄)²,    d = log π − log π0 − log_likelihood,    d̄: its mean over the prompt's n completions

    The mean over a prompt's completions is half the unbiased variance of d. It is 0 at the posterior, where d = −log Z
    for every completion, and for completions drawn from π its gradient is that of KL(π‖π*) with a leave-one-out
    baseline. Off policy it is another loss with the same minimum on what the draws cover.

    A **forbidden** completion has d = +∞, and no finite π makes it constant. Left out, mass on it would cost nothing;
    with a finite log-likelihood in its place, the posterior would no longer be the minimum. So its loss is

        ½·max(0, log π − log π0 + gap)²

    and the others are drawn to −log Z itself, not to a mean (trajectory balance with Z given): off policy, a baseline
    that moves mass from the forbidden to the others would move it there again each time they are replayed, past the
    posterior. That remains a minimum, where π = 0 and d = −log Z; a policy without loss puts at most `exp(−gap)` of
    the prior's mass on forbidden completions.

    Args:
        log_policy (`torch.Tensor`): log π (B,), in nats, with gradient.
        log_prior (`torch.Tensor`): log π0 (B,), in nats.
        log_likelihood (`torch.Tensor`): (B,), in nats; `-inf` for a forbidden completion, nan for one to be left out.
        centres (`LogVarianceCentres`): of these completions, from [`log_variance_centres`].
        huber_delta (`float`, *optional*): deviations beyond it, in nats, count linearly: `δ·(|r| − ½ δ)` for `½ r²`.
        forbidden_gap (`float`, defaults to `1.0`): nats below its prior at which a forbidden completion is let be. The
            forbidden stand this far out at first: a larger gap leaves less mass and makes noisier gradients, which
            `huber_delta` bounds.

    Returns:
        `torch.Tensor`: (B,), in nats², with gradient; 0 for completions left out, and for a permitted one alone.

    Raises:
        ValueError: if the shapes differ, a log-probability is not finite, or `huber_delta` or `forbidden_gap` is not
            positive.

    Source: Richter et al. 2020, arXiv 2010.10436; with a group mean for log Z and old
    samples: Bartoldson et al. 2025, arXiv 2503.18929. Forbidden completions: ours.
    """
    _check_options(huber_delta, forbidden_gap)
    difference = _differences(log_policy, log_prior, log_likelihood)  # (B,)
    forbidden = difference == torch.inf
    excess = (log_policy - log_prior + forbidden_gap).clamp(min=0)
    # filled before the arithmetic: inf and nan times 0 would leave a nan in the gradient
    deviation = torch.where(difference.isfinite(), difference, 0.0) - centres.centre
    residual = torch.where(forbidden, excess, torch.where(difference.isnan(), 0.0, deviation))
    return centres.scale * _huber(residual, huber_delta)


def _check_options(huber_delta: float | None, forbidden_gap: float = 1.0) -> None:
    if huber_delta is not None and not huber_delta > 0:
        raise ValueError(
            f"`huber_delta` must be positive, got {huber_delta}: nats beyond which a deviation counts linearly. "
            "`None` squares them all."
        )
    if not 0 < forbidden_gap < torch.inf:
        raise ValueError(
            f"`forbidden_gap` must be positive and finite, got {forbidden_gap}: nats that a forbidden completion must "
            "lie below its prior."
        )


def _huber(residual: Tensor, delta: float | None) -> Tensor:
    if delta is None or delta == torch.inf:
        return 0.5 * residual.square()
    clipped = residual.clamp(-delta, delta)
    return clipped * (residual - 0.5 * clipped)


def _differences(log_policy: Tensor, log_prior: Tensor, log_likelihood: Tensor) -> Tensor:
    """log π − log π0 − log_likelihood (B,): +inf where forbidden, nan where left out."""
    if not log_policy.shape == log_prior.shape == log_likelihood.shape or log_policy.dim() != 1:
        raise ValueError(
            "`log_policy`, `log_prior` and `log_likelihood` must have the same shape (B,), got "
            f"{tuple(log_policy.shape)}, {tuple(log_prior.shape)} and {tuple(log_likelihood.shape)}."
        )
    for name, log_prob in (("log_policy", log_policy), ("log_prior", log_prior)):
        if not log_prob.isfinite().all():
            raise ValueError(
                f"`{name}` must be finite, got {int((~log_prob.isfinite()).sum())} that are not: a completion that "
                "was drawn has a positive probability."
            )
    if bool((log_likelihood == torch.inf).any()):
        raise ValueError("`log_likelihood` must be finite, -inf or nan, got +inf. Bound the evidence from above.")
    return log_policy - log_prior - log_likelihood
