"""Combines several rewards of a completion into one."""

import torch
from torch import Tensor


def combine_rewards(
    rewards_per_func: Tensor,
    weights: Tensor,
    clip_range: tuple[float, float] | None = None,
    missing_eos_penalty: float | None = None,
    ended: Tensor | None = None,
) -> Tensor:
    r"""
    One reward per completion, as TRL's `RLOOTrainer` forms it, with an optional penalty where no EOS came:

        r  =  clip(sum_f w_f r_f)  -  missing_eos_penalty * [no EOS]

    A function that returned `None` (NaN here) adds nothing. Every argument moves the optimum, so it belongs to the
    posterior.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(B, F)`):
            Reward of each of F functions; NaN where it does not apply, `-inf` where it forbids the completion.
        weights (`torch.Tensor` of shape `(F,)`):
            Weight of each function.
        clip_range (`tuple[float, float]`, *optional*):
            Bounds of the weighted sum. A forbidden completion stays forbidden: `-inf` is not clipped.
        missing_eos_penalty (`float`, *optional*):
            Subtracted, after clipping, from completions that were cut before an EOS.
        ended (`torch.Tensor` of shape `(B,)`, bool, *optional*):
            Whether the completion holds an EOS. Needed with `missing_eos_penalty`.

    Returns:
        `torch.Tensor` of shape `(B,)`, fp32: in units of reward; NaN where every function returned `None`.

    Raises:
        `ValueError`: if shapes do not match, or `missing_eos_penalty` is given without `ended`.
    """
    if rewards_per_func.ndim != 2 or weights.shape != rewards_per_func.shape[1:]:
        raise ValueError(
            "`weights` must hold one weight for each column of `rewards_per_func` (B, F), got shapes "
            f"{tuple(weights.shape)} and {tuple(rewards_per_func.shape)}. Pass `torch.ones(F)` to weigh all alike."
        )
    rewards_per_func = rewards_per_func.float()
    weights = weights.to(rewards_per_func)  # (F,)
    applies = ~rewards_per_func.isnan()  # (B, F)
    # torch.where rather than a product: for a function of weight 0, a forbidden completion would give 0 · −inf = nan
    weighted = torch.where(applies & (weights != 0), rewards_per_func * weights, 0.0)  # (B, F)
    rewards = weighted.sum(-1)  # (B,)
    if clip_range is not None:
        low, high = clip_range
        rewards = torch.where(rewards == -torch.inf, rewards, rewards.clamp(low, high))
    if missing_eos_penalty is not None:
        if ended is None or ended.shape != rewards.shape:
            raise ValueError(
                f"`ended` must be a bool tensor of shape {tuple(rewards.shape)} with `missing_eos_penalty`, got "
                f"{None if ended is None else tuple(ended.shape)}. Pass whether each completion holds an EOS."
            )
        rewards = torch.where(ended, rewards, rewards - missing_eos_penalty)
    return torch.where(applies.any(-1), rewards, torch.nan)
