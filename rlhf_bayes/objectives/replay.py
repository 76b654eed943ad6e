"""Completions of past rollouts, kept to be learnt from again: the target never changes."""

from collections import deque
from typing import Any, final

import torch
from torch import Tensor

from rlhf_bayes.objectives.micro_batches import by_length, columns_of_rows

_PADDED_LEFT = ("prompt_ids", "prompt_mask")


@final
class ReplayBuffer:
    """
    The last rollouts of this process.

    Args:
        capacity (`int`):
            Rollouts that are kept.
        sampling (`str`):
            `"uniform"` over their completions, or `"recency"`: the weight of a rollout falls linearly with its age.
        seed (`int`):
            Of the draws.
    """

    def __init__(self, capacity: int, sampling: str, seed: int):
        self.sampling = sampling
        self.rollouts: deque[dict[str, Tensor]] = deque(maxlen=capacity)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, batches: list[dict[str, Tensor]]) -> None:
        """A rollout, as micro-batches. Of their tensors, those with a row for each completion are kept."""
        names = columns_of_rows(batches[0])
        self.rollouts.append({name: torch.cat([batch[name] for batch in batches]) for name in names})

    def sample(self, sizes: list[int]) -> list[dict[str, Tensor]]:
        """
        Micro-batches of completions, whole groups of a prompt in a rollout as far as they fit, none twice.

        Args:
            sizes (`list[int]`):
                Rows of each; together at most those of one rollout.

        Returns:
            `list[dict[str, Tensor]]`: as they were added, padded to the longest of all, in order of length.
        """
        size = sum(sizes)
        groups, weights = [], []
        for age, rollout in enumerate(reversed(self.rollouts)):
            for key in rollout["prompt_keys"].unique():
                rows = (rollout["prompt_keys"] == key).nonzero().flatten()
                groups.append((rollout, rows))
                weights.append(1.0 if self.sampling == "uniform" else 1.0 - age / len(self.rollouts))
        order = torch.multinomial(torch.tensor(weights), len(groups), generator=self.generator).tolist()
        parts, total = [], 0
        for index in order:
            rollout, rows = groups[index]
            parts.append((rollout, rows[: size - total]))
            total += len(parts[-1][1])
            if total == size:
                break
        names = parts[0][0]
        split = {name: _joined([rollout[name][rows] for rollout, rows in parts], name).split(sizes) for name in names}
        return by_length([{name: split[name][index] for name in names} for index in range(len(sizes))])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"rollouts": list(self.rollouts), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.rollouts = deque(state["rollouts"], maxlen=self.rollouts.maxlen)
        self.generator.set_state(state["generator"].cpu())


def _joined(parts: list[Tensor], name: str) -> Tensor:
    if parts[0].dim() == 1:
        return torch.cat(parts)
    # all others run along tokens, and what stands under a mask of 0 is never read
    width = max(part.size(1) for part in parts)
    side = (lambda missing: (missing, 0)) if name in _PADDED_LEFT else (lambda missing: (0, missing))
    return torch.cat([torch.nn.functional.pad(part, side(width - part.size(1))) for part in parts])
