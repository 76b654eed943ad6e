"""Keeps completions of past rollouts, to learn from them again: the target never changes."""

from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, final

import torch

from rlhf_bayes.objectives.batch import by_length, joined
from rlhf_bayes.objectives.gdc_batch import GDCBatch

B = TypeVar("B", bound=GDCBatch)


@final
class ReplayBuffer(Generic[B]):
    """
    The last rollouts of this process.

    Args:
        capacity (`int`):
            Number of rollouts that are kept.
        sampling (`str`):
            `"uniform"` over their completions, or `"recency"`: the weight of a rollout falls linearly with its age.
        seed (`int`):
            Seed of the draws.
    """

    def __init__(self, capacity: int, sampling: str, seed: int):
        self.capacity, self.sampling = capacity, sampling
        self.rollouts: deque[B] = deque(maxlen=capacity)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, batches: Sequence[B]) -> None:
        """Keep a rollout, given as its micro-batches. The oldest rollout is dropped."""
        self.rollouts.append(joined(batches))

    def sample(self, sizes: Sequence[int]) -> list[B]:
        """
        Draw micro-batches of completions without replacement, in whole groups of a prompt as far as they fit.

        Args:
            sizes (`Sequence[int]`):
                Number of rows of each micro-batch; together at most those of one rollout.

        Returns:
            `list[Batch]`: micro-batches as they were added, padded to the longest, in order of length.
        """
        size = sum(sizes)
        groups, weights = [], []
        for age, rollout in enumerate(reversed(self.rollouts)):
            for key in rollout.prompt_keys.unique():
                groups.append((rollout, (rollout.prompt_keys == key).nonzero().flatten()))
                weights.append(1.0 if self.sampling == "uniform" else 1.0 - age / len(self.rollouts))
        order = torch.multinomial(torch.tensor(weights), len(groups), generator=self.generator).tolist()
        parts, total = [], 0
        for index in order:
            rollout, rows = groups[index]
            parts.append(rollout.take(rows[: size - total]))
            total += len(parts[-1])
            if total == size:
                break
        return by_length(joined(parts).split(sizes))

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        rollouts = [rollout.columns() for rollout in self.rollouts]
        return {"rollouts": rollouts, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], batch_type: type[B]) -> None:
        """Restore what `state_dict` returned, as batches of the given type."""
        self.rollouts = deque(map(batch_type.from_columns, state["rollouts"]), maxlen=self.capacity)
        self.generator.set_state(state["generator"].cpu())
