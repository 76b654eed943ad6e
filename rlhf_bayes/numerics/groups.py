"""Statistics of groups, the completions of one prompt: leave-one-out baselines, and robust centres."""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """The place of each completion in a table (G, M) with a row for each group; M is the largest group's size."""

    row: Tensor
    """(B,): the completion's group, from 0 to G − 1."""
    column: Tensor
    """(B,): the completion's place in its group."""
    sizes: Tensor
    """(G,): the number of completions of each group."""

    def table(self, values: Tensor, fill: float) -> Tensor:
        """(B,) -> (G, M), `fill` where a group has fewer than M."""
        width = int(self.sizes.max()) if len(self.sizes) else 0
        return values.new_full((len(self.sizes), width), fill).index_put((self.row, self.column), values)

    def rows(self, table: Tensor) -> Tensor:
        """(G, M) -> (B,), or (G, 1) -> (B,)."""
        return table.expand(-1, max(table.size(-1), int(self.sizes.max())))[self.row, self.column]


def grouped(groups: Tensor) -> Groups:
    """
    The layout of the table for completions whose groups are given.

    Args:
        groups (`torch.Tensor`): integers (B,), equal for completions of the same prompt, in any order.

    Raises:
        ValueError: if it is not (B,) integers, B > 0.
    """
    if groups.dim() != 1 or groups.numel() == 0 or groups.is_floating_point() or groups.dtype == torch.bool:
        raise ValueError(
            f"`groups` must be integers (B,), B > 0, got {groups.dtype} of shape {tuple(groups.shape)}: one index of "
            "its prompt for each completion."
        )
    _, row, sizes = groups.unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)  # (B,)
    starts = sizes.cumsum(0) - sizes  # (G,)
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - starts[row[order]]
    return Groups(row, column, sizes)


def leave_one_out_baseline(
    rewards: Tensor, groups: Tensor, log_ratio: Tensor | None = None, default: float = 0.0
) -> Tensor:
    r"""
    Baseline of each completion: the mean reward of the others of its prompt, weighed by their importance ratios.

        b_i = R₀ + Σ_{j≠i} w_j·(R_j − R₀) / max(Σ_{j≠i} w_j, n − 1),    w = π/q

    On policy, where w = 1, it is the plain mean of the others. Off policy, if their weights sum to less than n − 1,
    the missing weight counts with R₀. The plain ratio of sums would instead rest on a few draws that π hardly makes
    any more, however large their R.

    b_i does not depend on x_i, so the gradient `w_i·(R_i − b_i)·∇log π(x_i)` is unbiased for any b_i. The baseline
    must be multiplied by w_i like the reward: under q ≠ π the expectation of `∇log π` alone is not 0.

    Args:
        rewards (`torch.Tensor`): rewards or pseudo-rewards (B,); nan for a completion to be left out.
        groups (`torch.Tensor`): integers (B,), equal for completions of the same prompt.
        log_ratio (`torch.Tensor`, *optional*): log π − log q (B,), in nats, for rewards drawn from q; `None` is 0.
        default (`float`, defaults to `0.0`): R₀, a guess of E_π[R] that does not depend on the draws.

    Returns:
        `torch.Tensor`: (B,), in units of the rewards, fp64 for fp64, else fp32; R₀ where no other completion counts.

    Raises:
        ValueError: if the shapes differ, or `groups` is not integers.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; importance ratios: Korbak et al.
    2022, arXiv 2206.00761. The weight that counts as R₀: ours.
    """
    log_ratio = torch.zeros_like(rewards) if log_ratio is None else log_ratio
    if not rewards.shape == groups.shape == log_ratio.shape:
        raise ValueError(
            f"`rewards`, `groups` and `log_ratio` must have the same shape (B,), got {tuple(rewards.shape)}, "
            f"{tuple(groups.shape)} and {tuple(log_ratio.shape)}."
        )
    layout = grouped(groups)
    excess = layout.table(rewards.detach().double() - default, torch.nan)  # (G, M)
    counted = ~excess.isnan()
    weights = layout.table(log_ratio.detach().double(), -torch.inf).exp()  # (G, M)
    weights, excess = torch.where(counted, weights, 0.0), torch.where(counted, excess, 0.0)
    others = torch.maximum(sum_of_others(weights), sum_of_others(counted.double()))  # (G, M)
    # without others the numerator is 0 as well, so the baseline is the default
    baseline = default + sum_of_others(weights * excess) / torch.where(others > 0, others, 1.0)
    return layout.rows(baseline).to(rewards.dtype if rewards.dtype == torch.float64 else torch.float32)


def huber_centre(values: Tensor, delta: float | None) -> Tensor:
    """
    Centre of each row: the mean, or with `delta` Huber's location, where the clipped deviations sum to 0.

        c = argmin_c Σ_i ρ(v_i − c),    ρ(r) = ½ r² for |r| ≤ δ, else δ·(|r| − ½ δ)

    Args:
        values (`torch.Tensor`): (G, M); nan is left out.
        delta (`float`, *optional*): δ, in units of the values.

    Returns:
        `torch.Tensor`: (G, 1), without gradient; nan for a row that holds only nan.

    Source: Huber 1964, Annals of Mathematical Statistics 35(1).
    """
    values = values.detach()
    mean = values.nanmean(-1, keepdim=True)  # (G, 1)
    if delta is None:
        return mean
    low = torch.where(values.isnan(), torch.inf, values).amin(-1, keepdim=True)
    high = torch.where(values.isnan(), -torch.inf, values).amax(-1, keepdim=True)
    # the sum of clipped deviations falls with c, so bisection finds its zero, here to the precision of fp64
    for _ in range(64):
        middle = 0.5 * (low + high)  # (G, 1)
        too_low = (values - middle).clamp(-delta, delta).nansum(-1, keepdim=True) > 0
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.where(mean.isnan(), torch.nan, 0.5 * (low + high))


def sum_of_others(table: Tensor) -> Tensor:
    """
    For each entry, the sum of its row's other entries: (G, M) -> (G, M).

    It is not computed as total minus own entry: a large entry would cancel all digits of the others.
    """
    zero = torch.zeros_like(table[:, :1])
    before = torch.cat([zero, table.cumsum(-1)[:, :-1]], -1)
    after = torch.cat([table.flip(-1).cumsum(-1).flip(-1)[:, 1:], zero], -1)
    return before + after
