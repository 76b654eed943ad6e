"""The log-variance loss: the variance of log π − log π0 − log_likelihood over the completions of a prompt."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_bayes.numerics.groups import grouped, huber_centre


class LogVarianceCentres(NamedTuple):
    """What [`log_variance_loss`] needs of a completion's siblings, without gradient."""

    centre: Tensor
    """(B,), in nats: the value that deviations are measured from, an estimate of −log Z."""
    scale: Tensor
    """(B,): n/(n − 1) for the n completions of a prompt, and 0 for a single one, which has no variance. With a given
    log Z it is 1, and 0 where that is not known."""


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

    It is computed apart from the loss, so that a prompt's completions may be spread over micro-batches. That is exact,
    since the derivative of the loss with respect to its centre is 0.

    Args:
        log_policy (`torch.Tensor`): log π (B,), in nats, as the policy is now.
        log_prior (`torch.Tensor`): log π0 (B,), in nats.
        log_likelihood (`torch.Tensor`): (B,), in nats; `-inf` for a forbidden completion, nan for one to be left out.
        groups (`torch.Tensor`): integers (B,), equal for completions of the same prompt. They may come from different
            policies.
        huber_delta (`float`, *optional*): as in the loss. The centre is then Huber's location, which an outlier hardly
            moves, instead of the mean.
        log_z (`torch.Tensor`, *optional*): log Z of the prompt of each completion (B,), in nats; nan or `-inf` where
            it is not known. The centre is then −log Z, which the loss of forbidden completions needs.

    Returns:
        [`LogVarianceCentres`]

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
    Log-variance loss of each completion. It needs no importance weights for completions from any proposal.

        ½·n/(n−1)·(d_i − d̄)²,    d = log π − log π0 − log_likelihood,    d̄: its mean over the prompt's n completions

    The mean over a prompt's completions is half the unbiased variance of d. It is 0 at the posterior, where d = −log Z
    for every completion, and for completions drawn from π its gradient is that of KL(π‖π*) with a leave-one-out
    baseline. Off policy it is another loss, with the same minimum on the completions that the draws cover.

    A **forbidden** completion has d = +∞ for every π > 0. If it were left out, mass on it would cost nothing; if it
    got a finite log-likelihood, the posterior would no longer be the minimum. So its loss is

        ½·max(0, log π − log π0 + gap)²

    and the deviations of the others are measured from −log Z itself, not from their mean (trajectory balance with a
    given Z). With the mean, a replayed forbidden completion would move mass to the others each time it is replayed,
    and so beyond the posterior. The posterior is still a minimum, since there π = 0 and d = −log Z. Where the loss is
    0, forbidden completions have at most `exp(−gap)` of their mass under the prior.

    Args:
        log_policy (`torch.Tensor`): log π (B,), in nats, with gradient.
        log_prior (`torch.Tensor`): log π0 (B,), in nats.
        log_likelihood (`torch.Tensor`): (B,), in nats; `-inf` for a forbidden completion, nan for one to be left out.
        centres (`LogVarianceCentres`): of these completions, from [`log_variance_centres`].
        huber_delta (`float`, *optional*): deviations beyond it, in nats, count linearly: `δ·(|r| − ½ δ)` for `½ r²`.
        forbidden_gap (`float`, defaults to `1.0`): the loss of a forbidden completion is 0 once log π is that many
            nats below log π0. At π = π0 its deviation is this gap, so a larger gap leaves less mass on forbidden
            completions, but makes gradients noisier, which `huber_delta` limits.

    Returns:
        `torch.Tensor`: (B,), in nats², with gradient; 0 for completions left out, and for a permitted one alone.

    Raises:
        ValueError: if the shapes differ, a log-probability is not finite, or `huber_delta` or `forbidden_gap` is not
            positive.

    Source: Richter et al. 2020, arXiv 2010.10436; with a group mean for log Z and old samples: Bartoldson et al. 2025,
    arXiv 2503.18929. Forbidden completions: ours.
    """
    _check_options(huber_delta, forbidden_gap)
    difference = _differences(log_policy, log_prior, log_likelihood)  # (B,)
    forbidden = difference == torch.inf
    excess = (log_policy - log_prior + forbidden_gap).clamp(min=0)
    # inf and nan are replaced before the arithmetic: times 0 they would leave a nan in the gradient
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
            f"`forbidden_gap` must be positive and finite, got {forbidden_gap}: it is how many nats the "
            "log-probability of a forbidden completion must fall below the prior's."
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
    usable = log_policy.isfinite() & log_prior.isfinite() & (log_likelihood != torch.inf)
    if usable.all():  # one question, since each makes the host wait for the device
        return log_policy - log_prior - log_likelihood
    for name, log_prob in (("log_policy", log_policy), ("log_prior", log_prior)):
        if not log_prob.isfinite().all():
            raise ValueError(
                f"`{name}` must be finite, got {int((~log_prob.isfinite()).sum())} that are not: a completion that "
                "was drawn has a positive probability."
            )
    raise ValueError("`log_likelihood` must be finite, -inf or nan, got +inf. Bound the evidence from above.")
