"""Rejection sampling with a bound that weights may exceed: acceptance rate and distance to the target."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_bayes.numerics.log_weights import log_z


class QuasiRejectionCurve(NamedTuple):
    """
    Acceptance rate and distances for each bound, from one batch of weights. All but `log_z` are (..., K), fp64.

    As the bound rises, the distance to the target falls, and the acceptance rate falls too.
    """

    log_bounds: Tensor
    """log B, nats; `-inf` keeps every draw of positive weight."""
    acceptance: Tensor
    """Share of the draws that are accepted."""
    tv: Tensor
    """Total variation distance of the accepted draws' distribution p_B from the target p."""
    kl: Tensor
    """KL(p‖p_B), nats."""
    log_z: Tensor
    """log Z of the target: (...)."""

    def log_bound_for(self, max_tv: float) -> Tensor:
        """
        The smallest bound of the curve whose TV is at most `max_tv`: (...), nats.

        Raises:
            ValueError: if `max_tv` is not between 0 and 1, or not reached.
        """
        if not 0 <= max_tv < 1:
            raise ValueError(f"`max_tv` must be at least 0 and below 1, got {max_tv}: 1 is reached by any bound.")
        reached = self.tv <= max_tv  # (..., K)
        if not bool(reached.any(-1).all()):
            raise ValueError(
                f"`max_tv` = {max_tv} is not reached by any bound of the curve, the best has "
                f"{float(self.tv.min(-1).values.max()):.3g}. Add larger bounds, up to the largest log-weight."
            )
        return torch.where(reached, self.log_bounds, torch.inf).min(-1).values


def quasi_rejection_curve(
    log_weights: Tensor, log_bounds: Tensor | None = None, log_proposal: Tensor | None = None
) -> QuasiRejectionCurve:
    r"""
    Acceptance rate, TV and KL of rejection sampling to its target, for bounds B that weights w = P/q may exceed.

        accept with probability min(1, w/B):    p_B(x) = min(P(x), B·q(x)) / Z_B,    acceptance = Z_B / B
        TV(p, p_B) = ½ E_q |w/Z − min(w, B)/Z_B|,    KL(p‖p_B) = log(Z_B/Z) + E_p[(log w − log B)₊]

    With B at or above every weight it is exact rejection. In the limit B → 0 each draw that the target allows is
    kept: p_0(x) = q(x)·1[P(x) > 0] / A, with A the acceptance rate, and KL(p‖p_0) = KL(p‖q) + log A, the identity of
    GUARD.

    Args:
        log_weights (`torch.Tensor`):
            log w (..., N), nats; `-inf` is weight 0.
        log_bounds (`torch.Tensor`, *optional*):
            log B (..., K), nats, or (K,) for all. Default: `-inf` and 100 quantiles of the finite log-weights, the
            largest included.
        log_proposal (`torch.Tensor`, *optional*):
            log q (..., N), where the N completions are enumerated. Default: they are N independent draws from q, and
            each counts 1/N.

    Returns:
        [`QuasiRejectionCurve`]; nan where every weight is 0.

    Raises:
        ValueError: for no weights, or nan or `+inf` among them.

    Source: Eikema et al. 2022, arXiv 2112.05702, section 2; the limit: Kim et al. 2024, arXiv 2410.06716.
    """
    if log_weights.dim() == 0 or log_weights.numel() == 0:
        raise ValueError(f"`log_weights` must be (..., N) with N > 0, got {tuple(log_weights.shape)}.")
    log_weights = log_weights.detach().double()
    if bool((log_weights.isnan() | (log_weights == torch.inf)).any()):
        raise ValueError(
            "`log_weights` must be finite or -inf, got nan or +inf. Look for a reward that is nan or inf."
        )
    n = log_weights.size(-1)
    uniform = torch.full_like(log_weights, 1 / n).log()
    log_q = uniform if log_proposal is None else log_proposal.detach().double()  # (..., N)
    bounds = _quantiles(log_weights) if log_bounds is None else log_bounds.detach().double()
    bounds = bounds.expand(*log_weights.shape[:-1], bounds.size(-1))[..., None]  # (..., K, 1)
    log_w, log_q = log_weights[..., None, :], log_q[..., None, :]  # (..., 1, N)
    allowed = log_w > -torch.inf
    # log of min(w, B)/B, which is finite at B = 0; torch.where, since −inf − (−inf) is nan
    log_keep = torch.where(allowed, torch.where(log_w < bounds, log_w - bounds, 0.0), -torch.inf)  # (..., K, N)
    log_acceptance = (log_q + log_keep).logsumexp(-1, keepdim=True)
    normaliser = (log_q + log_w).logsumexp(-1, keepdim=True)
    log_p, log_p_bound = log_q + log_w - normaliser, log_q + log_keep - log_acceptance  # (..., 1 or K, N)
    # log p − log p_B, in which log q cancels: so it is exact, and finite where q underflows
    log_ratio = torch.where(allowed, log_w - log_keep, 0.0) - normaliser + log_acceptance
    return QuasiRejectionCurve(
        log_bounds=bounds[..., 0],
        acceptance=log_acceptance.exp()[..., 0],
        tv=0.5 * (log_p.exp() - log_p_bound.exp()).abs().sum(-1),
        kl=(log_p.exp() * log_ratio).sum(-1).clamp(min=0),
        log_z=log_z(log_weights) if log_proposal is None else normaliser[..., 0, 0],
    )


def _quantiles(log_weights: Tensor) -> Tensor:
    """`-inf`, then 100 quantiles of the finite log-weights: (..., 101)."""
    rows = log_weights.reshape(-1, log_weights.size(-1))
    levels = torch.linspace(0, 1, 100, dtype=torch.float64)
    quantiles = []
    for row in rows:
        finite = row[row > -torch.inf].sort().values
        if finite.numel() == 0:
            finite = row.new_zeros(1)
        picked = finite[(levels.to(row.device) * (finite.numel() - 1)).ceil().long()]
        quantiles.append(torch.cat([row.new_full((1,), -torch.inf), picked]))
    return torch.stack(quantiles).view(*log_weights.shape[:-1], 101)
