"""What an objective needs of its training loop: a protocol, and its implementation for one process."""

from collections import defaultdict
from collections.abc import Callable
from typing import Protocol, final

import torch
from torch import Tensor

from rlhf_bayes.objectives.batch import Batch


class World(Protocol):
    """
    The training loop of an objective: its processes, its progress, its log, and the current policy.

    Attributes:
        training (`bool`): whether the current rollout is for training, rather than for an evaluation.
        step (`int`): number of optimizer steps taken so far.
        max_steps (`int`): number of optimizer steps of the whole training.
        process_index (`int`), num_processes (`int`): index of this process, and number of processes. All processes
            have the same number of rows.
    """

    @property
    def training(self) -> bool: ...

    @property
    def step(self) -> int: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def process_index(self) -> int: ...

    @property
    def num_processes(self) -> int: ...

    def gather(self, rows: Tensor) -> Tensor:
        """(B, …) of each process -> (B · num_processes, …), in the order of the processes."""
        ...

    def gather_tokens(self, rows: Tensor) -> Tensor:
        """`gather` for rows whose last dimension is tokens: it is padded with 0 to the longest of all processes."""
        ...

    def reduce(self, sums: Tensor) -> Tensor:
        """The sum over processes, same shape."""
        ...

    def log(self, name: str, value: float) -> None:
        """Add a value to a metric, whose mean is logged."""
        ...

    def log_probs(self, batch: Batch) -> Tensor:
        """log π(x | c) under the current policy, of the tokens that a policy drew: (B,), nats, without gradient."""
        ...


@final
class OneProcess:
    """
    A [`World`] of one process, for your own training loop: increase `step` in it, and read `metrics`.

    Args:
        log_probs (`Callable[[Batch], Tensor]`):
            Computes log π of a batch under the current policy, (B,), nats: the sum over the tokens
            `batch.policy_tokens`. It is called without gradient.
        max_steps (`int`):
            Number of optimizer steps of the whole training.
    """

    process_index = 0
    num_processes = 1

    def __init__(self, log_probs: Callable[[Batch], Tensor], max_steps: int):
        self.training, self.step, self.max_steps = True, 0, max_steps
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self._log_probs = log_probs

    def gather(self, rows: Tensor) -> Tensor:
        """The rows themselves: there is no other process."""
        return rows

    gather_tokens = gather

    def reduce(self, sums: Tensor) -> Tensor:
        """The sums themselves: there is no other process."""
        return sums

    def log(self, name: str, value: float) -> None:
        """Append the value to `metrics[name]`."""
        self.metrics[name].append(float(value))

    def log_probs(self, batch: Batch) -> Tensor:
        """The result of the function that was given at construction: (B,), nats."""
        with torch.no_grad():
            return self._log_probs(batch)


def own_rows(world: World, everyones: Tensor) -> Tensor:
    """The rows of this process, (B, …), among the rows of all, (B · num_processes, …), in the order of `gather`."""
    count = len(everyones) // world.num_processes
    return everyones[world.process_index * count : (world.process_index + 1) * count]
