"""A critic that was fitted in closed form: a linear forecast from a policy's hidden states, without a trunk."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_bayes.lm.critic import FITTED, critic_config, write_critic_config
from rlhf_bayes.numerics.ridge import with_constant

_MOST_STATES = 512  # entries of a hidden state; larger states are projected
_COEFFICIENTS = "fitted_critic.safetensors"


@final
@dataclass(frozen=True)
class FittedCritic:
    r"""
    Forecasts the return of a whole completion from its prefix.

        u(prompt, x_<t) = b + aᵀ·[h_t, −β·Σ_{i<t} log(π/π0)(x_i), t, t², r(x_<t), t·r(x_<t)]
                        ≈  E_π[r − β·log(π/π0)(x) | x_<t]

    h_t is the policy's last hidden state. [`~rlhf_bayes.PPOTrainer`] saves it beside the policy, in the folder
    `critic`, as [`~rlhf_bayes.lm.Critic`] is saved; its numbers belong to the policy that it was saved with.
    """

    coefficients: Tensor
    """(1 + F,): b and a."""
    hidden_size: int
    """H of the policy."""

    @property
    def reads_rewards(self) -> bool:
        """Whether the last two features are among the F, which need the rewards of prefixes."""
        return len(self.coefficients) - 1 - min(self.hidden_size, _MOST_STATES) > len(("paid", "t", "t²"))

    def forecast(self, hidden: Tensor, paid: Tensor, time: Tensor, prefix_rewards: Tensor | None = None) -> Tensor:
        """
        u of N prefixes: (N,), fp32, units of the reward.

        Args:
            hidden (`Tensor` (N, H)): the policy's last hidden state of each prefix.
            paid (`Tensor` (N,)): −β·log(π/π0) of each prefix, units of the reward.
            time (`Tensor` (N,)): number of tokens of each prefix.
            prefix_rewards (`Tensor` (N,), *optional*): r of each prefix, 0 for the empty one.

        Raises:
            ValueError: if rewards of prefixes are missing, or given to a critic that was fitted without them.
        """
        if (prefix_rewards is not None) != self.reads_rewards:
            raise ValueError(
                f"`prefix_rewards` must be {'given' if self.reads_rewards else 'None'} for a critic that was fitted "
                f"{'with' if self.reads_rewards else 'without'} rewards of prefixes."
            )
        features = prefix_features(prefix_states(hidden), paid, time, prefix_rewards)
        return with_constant(features) @ self.coefficients.to(features)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the coefficients to a folder that [`FittedCritic.from_pretrained`] reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"coefficients": self.coefficients.detach().cpu().contiguous()}, folder / _COEFFICIENTS)
        write_critic_config(folder, FITTED, self.hidden_size)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "FittedCritic":
        """
        Read a critic written by `save_pretrained`.

        Raises:
            ValueError: if the folder holds no critic, or one with a trunk.
        """
        config = critic_config(folder)
        if config["trunk"] != FITTED:
            raise ValueError(
                f"`folder` must hold a critic that was fitted in closed form, got a {config['trunk']} one in "
                f"`{folder}`. Read it by `Critic.from_pretrained`."
            )
        return cls(load_file(Path(folder) / _COEFFICIENTS)["coefficients"], config["hidden_size"])


def prefix_states(hidden: Tensor) -> Tensor:
    """What a fitted critic reads of hidden states, (…, H): (…, S) fp32. Large ones are projected at random."""
    size = hidden.size(-1)
    if size <= _MOST_STATES:
        return hidden.float()
    return hidden.float() @ _projection(size).to(hidden.device)


def prefix_features(states: Tensor, paid: Tensor, time: Tensor, prefix_rewards: Tensor | None) -> Tensor:
    """
    The features of each prefix: (…, F).

    Args:
        states (`Tensor` (…, S)): what `prefix_states` returned.
        paid (`Tensor` (…)): −β·Σ_{i<t} log(π/π0)(x_i), units of the reward.
        time (`Tensor` (…)): t, the number of tokens before.
        prefix_rewards (`Tensor` (…), *optional*): r of the tokens before, 0 where there are none.
    """
    columns = [paid, time, time**2]
    if prefix_rewards is not None:
        columns += [prefix_rewards, prefix_rewards * time]
    return torch.cat([states, torch.stack(columns, dim=-1).to(states)], dim=-1)


@functools.cache
def _projection(size: int) -> Tensor:
    """(H, S), the same in every process and run: it keeps distances but for a few percent."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, _MOST_STATES, generator=generator) / _MOST_STATES**0.5
