"""Optimizer steps that are not taken, whoever takes them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def withheld_steps(optimizer: Any, withhold: Callable[[], bool]) -> Iterator[None]:
    """
    Within: the optimizer leaves the weights and its own state alone whenever `withhold()` says so.

    DeepSpeed takes its step inside the backward pass, from gradients of its own: to remove those of the parameters
    holds nobody back there.

    Args:
        optimizer (`torch.optim.Optimizer`, or a wrapper of one):
            As [`~transformers.Trainer`] holds it.
        withhold (`Callable[[], bool]`):
            Asked at each step.
    """
    while hasattr(optimizer, "optimizer"):  # accelerate wraps that of DeepSpeed, which wraps torch's
        optimizer = optimizer.optimizer
    step = optimizer.step
    optimizer.step = lambda *args, **kwargs: None if withhold() else step(*args, **kwargs)
    try:
        yield
    finally:
        optimizer.step = step
