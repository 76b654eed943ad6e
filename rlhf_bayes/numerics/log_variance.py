"""The log-variance loss: how far log π − log π0 − log_likelihood is from being the same for a prompt's completions."""

from typing import NamedTuple

import torch
from torch import Tensor

from .groups import grouped, huber_centre


class LogVarianceCentres(NamedTuple):
    """What [`log_variance_loss`] needs to know of a completion's siblings. Constants."""

    centre: Tensor
    """(B,): the group's estimate of −log Z, in nats; 0 where there is none."""
    scale: Tensor
    """(B,): n/(n − 1) for a group of n completions that are not forbidden; 0 where n < 2: one has no spread."""


def log_variance_centres(
    log_policy: Tensor, log_prior: Tensor, log_likelihood: Tensor, groups: Tensor, huber_delta: float | None = None
) -> LogVarianceCentres:
    """
    Centre of `d = log π − log π0 − log_likelihood` over the completions of each prompt that are not forbidden.

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

    Returns:
        `LogVarianceCentres`: of each completion.

    Raises:
        ValueError: if the shapes differ, `groups` is not integers, a log-probability is not finite, or `huber_delta`
            is not positive.

    Source: as [`log_variance_loss`].
    """
    check_huber_delta(huber_delta)
    difference = _differences(log_policy.detach(), log_prior, log_likelihood)  # (B,)
    if groups.shape != difference.shape:
        raise ValueError(f"`groups` must be {tuple(difference.shape)}, got {tuple(groups.shape)}: one a completion.")
    layout = grouped(groups)
    # +inf is a forbidden completion: it would take the mean with it
    allowed = torch.where(difference == torch.inf, torch.nan, difference.double())  # (B,)
    table = layout.table(allowed, torch.nan)  # (G, M)
    counts = (~table.isnan()).sum(-1, keepdim=True)  # (G, 1)
    scale = torch.where(counts > 1, counts / (counts - 1).clamp(min=1), 0.0)
    centre = huber_centre(table, huber_delta).nan_to_num(nan=0.0)
    return LogVarianceCentres(layout.rows(centre).to(difference.dtype), layout.rows(scale).to(difference.dtype))


def log_variance_loss(
    log_policy: Tensor,
    log_prior: Tensor,
    log_likelihood: Tensor,
    centres: LogVarianceCentres,
    huber_delta: float | None = None,
    forbidden_gap: float = 10.0,
) -> Tensor:
    r"""
    Log-variance loss of each completion, wherever it was drawn from: no importance weights.

        ½·n/(n−1)·(d_i − d̄)²,    d = log π − log π0 − log_likelihood,    d̄: its mean over the prompt's n completions

    The mean over a prompt's completions is half the unbiased variance of d. It is 0 at the posterior, where d = −log Z
    for every completion, and for completions drawn from π its gradient is that of KL(π‖π*) with a leave-one-out
    baseline. Off policy it is another loss with the same minimum on what the draws cover.

    A **forbidden** completion has d = +∞, and no finite π makes it constant. Left out, mass on it would cost nothing;
    with a finite log-likelihood in its place, the posterior would no longer be the minimum. So it takes no part in d̄
    and adds, on one side only,

        ½·max(0, log π − log π0 + gap)²

    which is 0 at the posterior (π = 0), so that the posterior remains a minimum, exactly, and any policy without loss
    puts at most `exp(−gap)` of its mass on forbidden completions. The gradient starts at `gap` nats a completion, some
    times that of the others: `huber_delta` caps it.

    Args:
        log_policy (`torch.Tensor`): log π (B,), in nats, with gradient.
        log_prior (`torch.Tensor`): log π0 (B,), in nats.
        log_likelihood (`torch.Tensor`): (B,), in nats; `-inf` for a forbidden completion, nan for one to be left out.
        centres (`LogVarianceCentres`): of these completions, from [`log_variance_centres`].
        huber_delta (`float`, *optional*): deviations beyond it, in nats, count linearly: `δ·(|r| − ½ δ)` for `½ r²`.
        forbidden_gap (`float`, defaults to `10.0`): nats below its prior at which a forbidden completion is let be.

    Returns:
        `torch.Tensor`: (B,), in nats², with gradient; 0 for completions left out, and for one alone.

    Raises:
        ValueError: if the shapes differ, a log-probability is not finite, or `huber_delta` or `forbidden_gap` is not
            positive.

    Source: Richter et al. 2020, arXiv 2010.10436, definition 1 and proposition 1; with a group mean for log Z and old
    samples: Bartoldson et al. 2025, arXiv 2503.18929, section 3. Forbidden completions: ours.
    """
    check_huber_delta(huber_delta)
    if not 0 < forbidden_gap < torch.inf:
        raise ValueError(
            f"`forbidden_gap` must be positive and finite, got {forbidden_gap}: nats that a forbidden completion must "
            "lie below its prior."
        )
    difference = _differences(log_policy, log_prior, log_likelihood)  # (B,)
    forbidden, left_out = difference == torch.inf, difference.isnan()
    # filled before the arithmetic: inf and nan times 0 would leave a nan in the gradient
    allowed = torch.where(forbidden | left_out, centres.centre, difference) - centres.centre
    excess = (log_policy - log_prior + forbidden_gap).clamp(min=0)
    loss = torch.where(forbidden, _huber(excess, huber_delta), centres.scale * _huber(allowed, huber_delta))
    return torch.where(left_out, 0.0, loss)


def check_huber_delta(huber_delta: float | None) -> None:
    """Refuse a δ that is not positive: ValueError."""
    if huber_delta is not None and not huber_delta > 0:
        raise ValueError(
            f"`huber_delta` must be positive, got {huber_delta}: nats beyond which a deviation counts linearly. "
            "`None` squares them all."
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
