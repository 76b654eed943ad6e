"""The jackknife: bias and variance of any statistic of independent draws, by leaving groups of them out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NUM_GROUPS = 20


def jackknife(
    statistic: Callable[[list[Tensor]], Tensor], sizes: Sequence[int], num_groups: int = NUM_GROUPS
) -> tuple[Tensor, Tensor]:
    r"""
    A statistic without its bias of order 1/n, and its variance.

        θ = G·θ̂ − (G − 1)·mean_g θ̂_g,    Var = (G − 1)/G · Σ_g (θ̂_g − mean θ̂)²

    θ̂_g leaves out every G-th draw of each sample, starting from the g-th. The variance has G − 1 degrees of freedom.

    Args:
        statistic (`Callable`): computes the statistic, of any shape, from the positions of the draws to use, one index
            tensor for each sample.
        sizes (`Sequence[int]`): number of draws in each sample, at least 2.
        num_groups (`int`, defaults to `20`): G, at most the number of draws in the smallest sample.

    Returns:
        θ and its variance, in the statistic's shape; θ̂ and a variance of nan where θ̂ or a θ̂_g is not finite.

    Raises:
        ValueError: if a sample has fewer than two draws.

    Source: Shao & Tu 1995, "The jackknife and bootstrap", sections 1.2 and 2.3.
    """
    if min(sizes) < 2:
        raise ValueError(f"`sizes` must be at least 2, got {list(sizes)}: one draw cannot be left out.")
    groups = min(num_groups, *sizes)
    positions = [torch.arange(size) for size in sizes]
    whole = statistic(positions)
    parts = torch.stack([statistic([p[p % groups != g] for p in positions]) for g in range(groups)])  # (G, ...)
    estimate = groups * whole - (groups - 1) * parts.mean(0)
    variance = (groups - 1) * parts.var(0, correction=0)
    finite = whole.isfinite() & parts.isfinite().all(0)
    return torch.where(finite, estimate, whole), torch.where(finite, variance, torch.nan)
