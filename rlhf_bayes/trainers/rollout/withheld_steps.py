"""Withholds optimizer steps, also those that DeepSpeed takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def withheld_steps(optimizer: Any, withhold: Callable[[], bool]) -> Iterator[None]:
    """
    A context in which the optimizer takes no step, and changes neither weights nor state, when `withhold()` is true.

    Setting gradients to None would not suffice: DeepSpeed takes its step within the backward pass, and keeps gradients
    of its own.

    Args:
        optimizer (`torch.optim.Optimizer`, or a wrapper of one):
            As [`~transformers.Trainer`] holds it.
        withhold (`Callable[[], bool]`):
            Called at each step; true withholds it.
    """
    while hasattr(optimizer, "optimizer"):  # accelerate wraps DeepSpeed's optimizer, which wraps torch's
        optimizer = optimizer.optimizer
    step = optimizer.step
    optimizer.step = lambda *args, **kwargs: None if withhold() else step(*args, **kwargs)
    try:
        yield
    finally:
        optimizer.step = step
