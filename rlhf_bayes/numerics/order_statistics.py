"""Best of n: the expected score of the best of n completions by a proxy, and its KL to the prior."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def expected_best_of_n(proxy: Tensor, scores: Tensor, ns: Sequence[int]) -> Tensor:
    r"""
    Expected score of the best of n completions by a proxy, for each n, from N ≥ n draws for each prompt.

        E[s of the best of n] ≈ Σ_i C(i−1, n−1) / C(N, n) · s_(i),    s_(i): score of the draw of i-th lowest proxy

    It is the average over all subsets of n of the N draws: unbiased, with less noise than a single subset. Draws with
    equal proxies share their weights, as if one of the best of a subset were taken at random.

    Args:
        proxy (`torch.Tensor`): (P, N), the score by which the best is chosen; N independent draws for each of P
            prompts.
        scores (`torch.Tensor`): (P, N), the score of which the expectation is taken: the gold reward, or `proxy`.
        ns (`Sequence[int]`): sizes n, each from 1 to N.

    Returns:
        `torch.Tensor`: (len(ns),) fp32, the mean over prompts, in units of `scores`.

    Raises:
        ValueError: if the shapes differ, there are no draws, a value is not finite, or an n is outside 1 … N.

    Source: Nakano et al. 2021, arXiv 2112.09332, appendix I; as used in Gao et al. 2023, arXiv 2210.10760.
    """
    if proxy.shape != scores.shape or proxy.dim() != 2 or proxy.numel() == 0:
        raise ValueError(
            f"`proxy` and `scores` must have the same shape (prompts, draws), got {tuple(proxy.shape)} and "
            f"{tuple(scores.shape)}."
        )
    for name, values in (("proxy", proxy), ("scores", scores)):
        if not values.isfinite().all():
            raise ValueError(f"`{name}` must be finite, got nan or inf in {int((~values.isfinite()).sum())} places.")
    num_draws = proxy.size(1)
    if len(ns) == 0:
        raise ValueError(f"`ns` must hold at least one n, got {ns!r}.")
    for n in ns:
        if not isinstance(n, int) or not 1 <= n <= num_draws:
            raise ValueError(
                f"`ns` must be integers from 1 to the number of draws a prompt, {num_draws}, got {n!r}. Draw more "
                "completions, or ask for a smaller n."
            )
    order = proxy.argsort(dim=1)
    ascending = proxy.gather(1, order)  # (P, N)
    ranked = _tie_means(scores.double().gather(1, order), ascending)  # (P, N)
    weights = torch.stack([_rank_weights(num_draws, n) for n in ns]).to(ranked.device)  # (len(ns), N)
    return (weights @ ranked.mean(0)).float()


def _tie_means(ranked: Tensor, ascending: Tensor) -> Tensor:
    """Scores (P, N) in the order of their proxies, those of equal proxies replaced by their mean."""
    starts = torch.ones_like(ascending, dtype=torch.bool)
    starts[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    group = starts.cumsum(1) - 1  # (P, N)
    sums = torch.zeros_like(ranked).scatter_add_(1, group, ranked)
    counts = torch.zeros_like(ranked).scatter_add_(1, group, torch.ones_like(ranked))
    return (sums / counts.clamp(min=1)).gather(1, group)


def _rank_weights(num_draws: int, n: int) -> Tensor:
    """Probability (N,) that the i-th lowest of N is the highest of n drawn from them without replacement. fp64."""
    total = math.comb(num_draws, n)
    # exact integers, since a quotient of gamma functions loses its digits at large N
    return torch.tensor([math.comb(rank, n - 1) / total for rank in range(num_draws)], dtype=torch.float64)


def best_of_n_kl_bound(n: int) -> float:
    """
    Upper bound on KL(best of n‖prior), in nats: `log n − (n−1)/n`. It is attained where all rewards differ.

    Args:
        n (`int`): number of completions of which the best is taken, at least 1.

    Raises:
        ValueError: if n is not an integer of at least 1.

    Source: Stiennon et al. 2020, arXiv 2009.01325, appendix G.3; Beirami et al. 2024, arXiv 2401.01879, show that it
    is a bound.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"`n` must be an integer of at least 1, got {n!r}.")
    return math.log(n) - (n - 1) / n


def best_of_n_kl(rewards: Tensor, n: int, log_prob: Tensor | None = None) -> Tensor:
    r"""
    KL(best of n‖prior), where rewards may be equal:

        Σ_v p_n(v)·log(p_n(v)/p(v)),    p_n(v) = F(v)ⁿ − F⁻(v)ⁿ

    over the values v of the reward, with F(v) and F⁻(v) the prior's probability of a reward of at most v and below v.
    Completions of equal reward keep the prior's proportions, so the KL of completions is that of their rewards. A
    value that occurs once in a sample is treated as a point of a continuous distribution, p = dF and p_n = n·Fⁿ⁻¹·dF:
    without ties the result is log n − (n−1)/n, as it must be.

    Args:
        rewards (`torch.Tensor`):
            (N,): rewards of completions; `-inf` is the lowest.
        n (`int`):
            Number of completions of which the best is taken, at least 1.
        log_prob (`torch.Tensor`, *optional*):
            (N,), nats: log π0 of each, where the N are all completions. Default: they are N draws from π0.

    Returns:
        `torch.Tensor`: nats, fp64 scalar.

    Raises:
        ValueError: if n is below 1, there are no rewards, or one is nan or `+inf`.

    Source: Beirami et al. 2024, arXiv 2401.01879, section 3.
    """
    bound = best_of_n_kl_bound(n)
    if rewards.dim() != 1 or rewards.numel() == 0 or bool((rewards.isnan() | (rewards == torch.inf)).any()):
        raise ValueError(f"`rewards` must be (N,) with N > 0, finite or -inf, got shape {tuple(rewards.shape)}.")
    values, inverse, counts = rewards.detach().cpu().unique(return_inverse=True, return_counts=True)
    if log_prob is None:
        mass = counts.double() / rewards.numel()
    else:
        mass = torch.zeros(len(values), dtype=torch.float64).index_add(
            0, inverse, log_prob.detach().double().cpu().exp()
        )
        mass = mass / mass.sum()
    high = mass.cumsum(0).clamp(max=1)  # F
    low = torch.cat([mass.new_zeros(1), high[:-1]])  # F⁻
    best = high**n - low**n  # (V,)
    tied = torch.special.xlogy(best, best) - torch.special.xlogy(best, mass)
    if log_prob is not None:
        return tied.sum().clamp(min=0)

    def integral(u: Tensor) -> Tensor:  # of n·uⁿ⁻¹·log(n·uⁿ⁻¹) from 0
        return u**n * bound + (n - 1) * torch.special.xlogy(u**n, u)

    return torch.where(counts > 1, tied, integral(high) - integral(low)).sum().clamp(min=0)
