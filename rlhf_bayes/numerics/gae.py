"""Generalised advantage estimation on right-padded completions."""

import torch
from torch import Tensor

from rlhf_bayes.numerics.masked import zero_padding


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float | Tensor = 0.95
) -> tuple[Tensor, Tensor]:
    """
    Advantages and returns of right-padded completions.

        δ_t = r_t + γ V_{t+1} − V_t        A_t = δ_t + γ λ A_{t+1}        returns = A + V

    The value after the last valid token is 0: a completion ends there, by EOS or by truncation, and truncated
    completions are ordinary members of the support.

    Args:
        rewards (`torch.Tensor`): rewards per token (B, T).
        values (`torch.Tensor`): values of the states before each token (B, T), in units of the reward.
        mask (`torch.Tensor`): bool (B, T), right-padded. Padding of `rewards` and `values` may hold anything.
        gamma (`float`, defaults to `1.0`): discount. Below 1 the optimum is no longer the posterior.
        lam (`float` or scalar `torch.Tensor`, defaults to `0.95`): 0 gives the one-step residual, 1 the return minus
            the value.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: advantages (B, T) and returns (B, T), fp32 or better, 0 on padding.

    Raises:
        ValueError: if the shapes differ, `mask` is not bool and right-padded, or `gamma` or `lam` is outside [0, 1].

    Source: Schulman et al. 2016, arXiv 1506.02438, equation 16.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {number}.")
    rewards, values = zero_padding(rewards, mask), zero_padding(values, mask)  # (B, T)
    if rewards.shape != values.shape or rewards.dim() != 2:
        raise ValueError(
            f"`rewards` and `values` must both be (B, T), got {tuple(rewards.shape)} and {tuple(values.shape)}."
        )
    check_right_padded(mask)
    return gae_of_padded(rewards, values, gamma, lam)


def gae_of_padded(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float | Tensor = 0.95
) -> tuple[Tensor, Tensor]:
    """
    [`gae`] of rewards and values that are known to be right-padded with 0, without its checks.

    A check asks for values, so the host waits for the device.

    Args:
        rewards, values (`torch.Tensor`): (B, T), 0 on padding.
        gamma, lam: as in [`gae`].
    """
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # (B, T), 0 after the last token
    residuals = rewards + gamma * next_values - values  # (B, T), 0 on padding
    advantages = torch.zeros_like(residuals)
    advantage = residuals.new_zeros(residuals.size(0))  # (B,)
    for t in reversed(range(residuals.size(1))):
        advantage = residuals[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values


def check_right_padded(mask: Tensor) -> None:
    """Raise ValueError if a valid token follows padding in a mask (B, T)."""
    resumed = (mask[:, 1:] & ~mask[:, :-1]).any(-1)  # (B,)
    if resumed.any():
        raise ValueError(
            f"`mask` must be right-padded, got a valid token after padding in row {int(resumed.nonzero()[0])}: the "
            "token before the gap would be taken for the last one. Pass completion tokens only, padded on the right."
        )
