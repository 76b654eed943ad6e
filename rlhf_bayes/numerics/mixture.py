"""Pools the draws of several distributions by weighting each as a draw of their mixture."""

from collections.abc import Sequence

import torch
from torch import Tensor

_BISECTIONS = 40
_KEPT = 0.1  # each distribution keeps at least this part of its share of the draws


def log_fitted_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    r"""
    Log-density of the mixture ω·p + (1 − ω)·q that makes N pooled draws from p and q most likely.

    A `share` of the draws came from p and the others from q.

        ω = argmax Σ_i log(ω·p(x_i) + (1 − ω)·q(x_i)),    Ẑ = 1/N Σ_i P(x_i) / (ω·p(x_i) + (1 − ω)·q(x_i))

    With ω = `share` this is the balance heuristic (Veach & Guibas 1995). The fitted ω uses in addition that p and q
    sum to 1: Ẑ has no variance when P is proportional to p, to q or to a mixture of them, and asymptotically never
    more than the better of the two alone. Each keeps at least a tenth of its share of the draws, so no weight is more
    than ten times that of the balance heuristic: a q that misses part of P does little harm.

    Args:
        log_p, log_q (`torch.Tensor`): (..., N), nats, normalised, at all pooled draws, no matter which of the two drew
            them.
        share (`float`): the share of the draws that p made, between 0 and 1, exclusive.

    Returns:
        `torch.Tensor`: (..., N), nats, fp64.

    Raises:
        ValueError: if the shapes differ, or the share is not between 0 and 1.

    Source: Tan 2004, "On a likelihood approach for Monte Carlo integration", JASA 99(468); Owen & Zhou 2000, "Safe and
    effective importance sampling", JASA 95(449).
    """
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"`log_p` and `log_q` must have the same shape, got {tuple(log_p.shape)} and {tuple(log_q.shape)}: score "
            "every draw under both."
        )
    if not 0 < share < 1:
        raise ValueError(f"`share` must be between 0 and 1, got {share}: there must be draws of both.")
    log_p, log_q = log_p.double(), log_q.double()
    omega = log_p.new_tensor(share)
    log_balance = torch.logaddexp(log_p + omega.log(), log_q + torch.log1p(-omega))  # (..., N)
    slope = (log_p - log_balance).exp() - (log_q - log_balance).exp()  # (..., N), between −1/(1 − share) and 1/share
    low, high = (torch.full_like(slope[..., 0], (1 - _KEPT) * end) for end in (-share, 1 - share))
    for _ in range(
        _BISECTIONS
    ):  # the likelihood is concave in ω, so its derivative falls and bisection finds the zero
        shift = (low + high) / 2  # (...)
        rising = (slope / (1 + shift[..., None] * slope)).sum(-1) > 0
        low, high = torch.where(rising, shift, low), torch.where(rising, high, shift)
    return log_balance + torch.log1p((low + high)[..., None] / 2 * slope)


def log_balance(log_densities: Tensor, counts: Sequence[int]) -> Tensor:
    r"""
    Log-density of the mixture that pooled draws of several proposals come from, the balance heuristic.

        log q(x) = log Σ_k n_k/N · q_k(x),    N = Σ_k n_k

    Args:
        log_densities (`torch.Tensor`): (K, N), nats: each of K proposals at all pooled draws.
        counts (`Sequence[int]`): n_k, the number of draws of each proposal.

    Returns:
        `torch.Tensor`: (N,), nats, fp64.

    Raises:
        ValueError: if there is another number of counts than of proposals, or a count is not positive.

    Source: Veach & Guibas 1995, "Optimally combining sampling techniques for Monte Carlo rendering".
    """
    if log_densities.dim() != 2 or len(counts) != len(log_densities) or min(counts, default=0) < 1:
        raise ValueError(
            f"`counts` must hold a positive number for each of the proposals of `log_densities` (K, N), got {counts} "
            f"for {tuple(log_densities.shape)}."
        )
    shares = torch.tensor(counts, dtype=torch.float64, device=log_densities.device)
    return torch.logsumexp(log_densities.double() + (shares / shares.sum()).log()[:, None], dim=0)
