"""Gain and bias of a reward. They fix its scale, without which β has no meaning."""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Normalization:
    """
    Gain and bias of each member of a reward: mean 0 and standard deviation 1 on reference completions.

        r_k  =  gain_k · raw_k + bias_k            (Ziegler et al. 2019, arXiv 1909.08593, section 2.1)

    Args:
        gain (`Sequence[float]`): K positive numbers, units of reward per raw unit.
        bias (`Sequence[float]`): K numbers, units of reward.
        reference (`str`): A description of the completions, for the model card.

    Raises:
        `ValueError`: if lengths differ, or a gain is not positive and finite.
    """

    gain: tuple[float, ...]
    bias: tuple[float, ...]
    reference: str

    def __post_init__(self):
        object.__setattr__(self, "gain", tuple(float(value) for value in self.gain))
        object.__setattr__(self, "bias", tuple(float(value) for value in self.bias))
        if not self.gain or len(self.gain) != len(self.bias):
            raise ValueError(
                f"`gain` and `bias` must hold one number for each member, got {len(self.gain)} and {len(self.bias)}. "
                "Fit them again with `Normalization.fit`."
            )
        if not all(0 < gain < math.inf for gain in self.gain) or not all(map(math.isfinite, self.bias)):
            raise ValueError(
                f"`gain` must be positive and finite and `bias` finite, got {list(self.gain)} and {list(self.bias)}: "
                "a negative gain would turn the preferences round. Fit them again with `Normalization.fit`."
            )

    @classmethod
    def fit(cls, member_rewards: Tensor, reference: str) -> "Normalization":
        """
        Gain and bias that give each member mean 0 and (population) standard deviation 1 on these rewards.

        Args:
            member_rewards (`torch.Tensor` of shape `(K, N)`): Raw rewards of N reference completions.
            reference (`str`): A description of the completions.

        Raises:
            `ValueError`: if there are fewer than two completions, rewards are not finite, or a member does not vary.
        """
        if member_rewards.ndim != 2 or member_rewards.shape[1] < 2:
            raise ValueError(
                "`member_rewards` must hold each member's rewards of at least 2 completions, (K, N), got shape "
                f"{tuple(member_rewards.shape)}: one number has no spread. Pass more reference completions."
            )
        if not member_rewards.isfinite().all():
            member, row = (~member_rewards.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"`member_rewards` must be finite, got {member_rewards[member, row].item()} for member {member} and "
                f"completion {row}. Its weights or its precision are broken; try the model in float32."
            )
        rewards = member_rewards.double()  # (K, N)
        mean, std = rewards.mean(-1), rewards.std(-1, correction=0)  # (K,)
        # a standard deviation below the resolution of fp32 is only rounding
        flat = std <= 4 * torch.finfo(torch.float32).eps * rewards.abs().amax(-1)
        if flat.any():
            member = int(flat.nonzero()[0])
            raise ValueError(
                f"`member_rewards` must vary between completions, but member {member} gave "
                f"{rewards[member, 0].item():.6g} to all {rewards.shape[1]}. Pass completions that differ, or train "
                "the member: its head may be all zeros."
            )
        return cls(tuple((1 / std).tolist()), tuple((-mean / std).tolist()), reference)

    def apply(self, member_rewards: Tensor) -> Tensor:
        """gain · raw + bias: (K, B) raw rewards -> (K, B) rewards, a row for each member."""
        if member_rewards.ndim != 2 or member_rewards.shape[0] != len(self.gain):
            raise ValueError(
                f"`member_rewards` must have shape (K, B) with K = {len(self.gain)} members as the normalization, got "
                f"{tuple(member_rewards.shape)}. Normalise the ensemble again."
            )
        gain, bias = (member_rewards.new_tensor(values)[:, None] for values in (self.gain, self.bias))  # (K, 1)
        return gain * member_rewards + bias

    def member(self, index: int) -> "Normalization":
        """The normalization of one member alone."""
        return Normalization((self.gain[index],), (self.bias[index],), self.reference)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that is stored in the index file."""
        return {"gain": list(self.gain), "bias": list(self.bias), "reference": self.reference}
