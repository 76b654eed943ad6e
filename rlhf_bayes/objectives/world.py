"""What an objective asks of the loop that runs it, and the answer of a loop in one process."""

from collections import defaultdict
from collections.abc import Callable
from typing import Protocol, final

import torch
from torch import Tensor

from rlhf_bayes.objectives.batch import Batch


class World(Protocol):
    """
    The loop around an objective: its processes, its progress, its log, and the policy as it is now.

    Attributes:
        training (`bool`): whether the rollout at hand is to be learnt from; else it is an evaluation.
        step (`int`): optimizer steps taken so far.
        max_steps (`int`): optimizer steps that will have been taken at the end.
        process_index (`int`), num_processes (`int`): of this process, and of all. Each process has as many rows.
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
        """The same where the last dimension runs along tokens, which are fewer in some processes: padded with 0."""
        ...

    def reduce(self, sums: Tensor) -> Tensor:
        """The sum over processes, same shape."""
        ...

    def log(self, name: str, value: float) -> None:
        """Add a value to a metric, of which the mean is shown."""
        ...

    def log_probs(self, batch: Batch) -> Tensor:
        """log π(x | c) of the completions under the policy as it is now: (B,), nats, without gradient."""
        ...


@final
class OneProcess:
    """
    A [`World`] of one process, for training loops of one's own: count `step` up, and read `metrics`.

    Args:
        log_probs (`Callable[[Batch], Tensor]`):
            log π of a batch under the policy as it is now, (B,), nats. It is called without gradient.
        max_steps (`int`):
            Optimizer steps of the whole training.
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
        """What the function given at construction says, (B,), nats."""
        with torch.no_grad():
            return self._log_probs(batch)


def own_rows(world: World, everyones: Tensor) -> Tensor:
    """Of rows (B · num_processes, …) as `gather` orders them: those of this process, (B, …)."""
    count = len(everyones) // world.num_processes
    return everyones[world.process_index * count : (world.process_index + 1) * count]
