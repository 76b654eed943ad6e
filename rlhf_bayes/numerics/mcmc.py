"""Convergence of Markov chains: R̂, and the effective sample size of correlated states."""

import math

import torch
from scipy.stats import f as fisher
from torch import Tensor


def rhat(chains: Tensor) -> Tensor:
    r"""
    Rank-normalised split R̂: close to 1 where all half chains have the same distribution. Above 1.01, run them longer.

        R̂ = √(((S − 1)/S·W + B) / W),    W: variance within the half chains, B: variance of their means

    It is computed for the normal scores of the values and for those of their distances from the median; the larger is
    returned.

    Args:
        chains (`torch.Tensor`):
            (C, S): S ≥ 4 states of C chains. If S is odd, the middle state is left out.

    Returns:
        `torch.Tensor`: scalar, fp64; nan where all values are equal.

    Raises:
        ValueError: if the shape is not (C, S), there are fewer than 4 states, or values are not finite.

    Source: Vehtari et al. 2021, Bayesian Analysis 16(2), arXiv 1903.08008.
    """
    chains = _halves(chains)
    folded = (chains - _median(chains)).abs()
    return torch.maximum(_split_rhat(_normal_scores(chains)), _split_rhat(_normal_scores(folded)))


def rhat_limit(num_chains: int, num_states: int, looks: int = 1) -> float:
    r"""
    The R̂ above which chains disagree: 1.1, or what independent states of so short chains exceed by chance.

        R̂² = (s − 1)/s + F/s,    F ~ Fisher(m − 1, m·(s − 1)) for m half chains of s independent normal states

    Args:
        num_chains (`int`): C.
        num_states (`int`): S ≥ 4, states of each chain.
        looks (`int`, defaults to `1`): numbers of which the largest R̂ is compared; chance exceeds the limit in one of
            100 cases of so many looks, at most.

    Returns:
        `float`: the limit, at least 1.1.

    Raises:
        ValueError: if there are fewer than 4 states or no chains.

    Source: Gelman & Rubin 1992, Statistical Science 7(4); R̂ < 1.1 is their rule.
    """
    if num_chains < 1 or num_states < 4:
        raise ValueError(f"`num_chains` must be at least 1 and `num_states` 4, got {num_chains} and {num_states}.")
    m, s = 2 * num_chains, num_states // 2
    quantile = float(fisher.isf(0.01 / looks, m - 1, m * (s - 1)))
    return max(1.1, math.sqrt((s - 1 + quantile) / s))


def effective_sample_size(chains: Tensor) -> Tensor:
    r"""
    The number of independent draws that would estimate the mean as precisely as these correlated states:

        ESS = C·S / τ,    τ = −1 + 2 Σ_k (ρ_2k + ρ_2k+1)

    ρ_t is the autocorrelation at lag t over all half chains, which counts the variance between chains too. The sum
    ends before the first negative pair, and each pair is lowered to the smallest before it.

    Args:
        chains (`torch.Tensor`):
            (C, S): S ≥ 4 states of C chains.

    Returns:
        `torch.Tensor`: scalar, fp64, at most C·S·log₁₀(C·S); nan where all values are equal.

    Raises:
        ValueError: as for `rhat`.

    Source: Geyer 1992, Statistical Science 7(4); Vehtari et al. 2021, arXiv 1903.08008, section 3.
    """
    chains = _halves(chains)  # (C, S)
    c, s = chains.shape
    centred = chains - chains.mean(-1, keepdim=True)
    # padded to twice the length, since the Fourier transform is periodic and the chain is not
    spectrum = torch.fft.rfft(centred, n=2 * s)
    autocovariance = torch.fft.irfft(spectrum.abs() ** 2, n=2 * s)[:, :s].mean(0) / s  # (S,)
    within = autocovariance[0] * s / (s - 1)
    total = autocovariance[0] + chains.mean(-1).var()
    rho = 1 - (within - autocovariance) / total  # (S,)
    rho[0] = 1.0
    pairs = rho[: s // 2 * 2].view(-1, 2).sum(-1)
    negative = (pairs < 0).nonzero().flatten()
    pairs = pairs[: int(negative[0])] if len(negative) else pairs
    tau = -1 + 2 * pairs.cummin(0).values.sum()
    return c * s / tau.clamp(min=1 / math.log10(c * s))


def _halves(chains: Tensor) -> Tensor:
    """Each chain split into two halves: (C, S) -> (2C, S // 2), fp64, on the CPU."""
    if chains.dim() != 2 or chains.size(0) < 1 or chains.size(1) < 4:
        raise ValueError(f"`chains` must be (C, S) with at least 4 states of each chain, got {tuple(chains.shape)}.")
    chains = chains.detach().double().cpu()
    if not bool(chains.isfinite().all()):
        raise ValueError("`chains` must be finite, got nan or inf.")
    half = chains.size(1) // 2
    return torch.cat([chains[:, :half], chains[:, -half:]])


def _split_rhat(chains: Tensor) -> Tensor:
    s = chains.size(1)
    within = chains.var(-1).mean()
    return (((s - 1) / s * within + chains.mean(-1).var()) / within).sqrt()


def _normal_scores(chains: Tensor) -> Tensor:
    """Normal quantiles of the ranks over all chains, ties at their mean rank."""
    _, inverse, counts = chains.flatten().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts - 1) / 2)[inverse].view(chains.shape)  # 1 … n
    return torch.special.ndtri((ranks - 0.375) / (chains.numel() + 0.25))


def _median(values: Tensor) -> Tensor:
    # torch's median would be the lower of the two middle values
    return values.flatten().quantile(0.5) if values.numel() < 2**24 else values.median()
