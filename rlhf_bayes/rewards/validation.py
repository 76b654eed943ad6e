"""Checks what a reward function returns, each time that it is called."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import nn

FLOAT32_MAX = torch.finfo(torch.float32).max


def callable_name(func: Any) -> str:
    """Name of a reward function as TRL reports it: `__name__`, also inside `functools.partial`, or the class."""
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def is_async_callable(func: Any) -> bool:
    """Whether calling `func` gives a coroutine, also for `functools.partial` and for objects with `__call__`."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def checked(func: Any, allow_forbidden: bool = False) -> Any:
    r"""
    The same reward function, with what it returns validated: one finite number or `None` for each completion.

    A number may be an `int`, `float`, `bool`, a numpy scalar or a tensor without dimensions. Numbers may come in a
    list, a tuple, another ordered iterable, or a 1-D array or tensor. `None` ("does not apply to this completion", as
    in TRL) is kept.

    Args:
        func (`Callable`, `torch.nn.Module` or `str`):
            Reward function of TRL's protocol, `func(prompts=, completions=, completion_ids=, **columns)`, sync or
            async. A sequence-classification model, or the path to one, is returned as it is: it has another protocol.
        allow_forbidden (`bool`, *optional*, defaults to `False`):
            Whether a reward may be `-inf`, which forbids the completion. For features and predicates it may not.

    Returns:
        `Callable`: async if `func` is, with its `__name__`. Returns `list[float | None]`.

    Raises:
        `TypeError`: if `func` cannot be called, or returns something other than one number or `None` per completion.
        `ValueError`: if `func` returns the wrong count, NaN, an infinity, or a number beyond float32.
        `Exception`: whatever `func` raises, with a note that names it.
    """
    if isinstance(func, (str, nn.Module)):
        return func
    if not callable(func):
        raise TypeError(
            "`reward_funcs` must hold functions, sequence-classification models or paths to such models, got "
            f"{func!r} of type {type(func).__name__}. Pass a function `f(prompts, completions, **kwargs)` returning a "
            "list of numbers."
        )
    name = callable_name(func)
    wrapper: Any = (_checked_async if is_async_callable(func) else _checked_sync)(func, name, allow_forbidden)
    # not functools.wraps: it would copy the attributes of a callable object onto the function
    wrapper.__name__ = wrapper.__qualname__ = name
    wrapper.__doc__ = getattr(func, "__doc__", None)
    wrapper.__wrapped__ = func
    return wrapper


def _checked_sync(func: Any, name: str, allow_forbidden: bool) -> Callable:
    def call(prompts, completions, **kwargs):
        try:
            output = func(prompts=prompts, completions=completions, **kwargs)
        except Exception as error:
            _note_origin(error, name, kwargs)
            raise
        return validate_rewards(output, name, len(completions), allow_forbidden)

    return call


def _checked_async(func: Any, name: str, allow_forbidden: bool) -> Callable:
    async def call(prompts, completions, **kwargs):
        try:
            output = await func(prompts=prompts, completions=completions, **kwargs)
        except Exception as error:
            _note_origin(error, name, kwargs)
            raise
        return validate_rewards(output, name, len(completions), allow_forbidden)

    return call


def _note_origin(error: Exception, name: str, kwargs: Mapping[str, Any]) -> None:
    keywords = ", ".join(f"{key}=" for key in ("prompts", "completions", *kwargs))
    error.add_note(
        f"Raised inside the reward function '{name}', called as {name}({keywords}). It must accept these keyword "
        "arguments (take `**kwargs` for those that it does not use) and return one number or None for each completion."
    )


def validate_rewards(output: Any, name: str, num_completions: int, allow_forbidden: bool) -> list[float | None]:
    """
    The rewards that a function returned, as one float or `None` per completion, by the rules of [`checked`].

    Args:
        output (`Any`): What the function returned.
        name (`str`): Name of the function.
        num_completions (`int`): Number of completions.
        allow_forbidden (`bool`): As in [`checked`].
    """
    values = _as_list(output, name, num_completions)
    if len(values) != num_completions:
        raise ValueError(
            f"The reward function '{name}' must return one reward for each of the {num_completions} completions, got "
            f"{len(values)}. Return None where it does not apply to a completion, rather than leaving it out."
        )
    return [_as_reward(value, index, name, allow_forbidden) for index, value in enumerate(values)]


def _as_list(output: Any, name: str, num_completions: int) -> list:
    rule = f"The reward function '{name}' must return a number or None for each of the {num_completions} completions"
    if inspect.isawaitable(output):
        if inspect.iscoroutine(output):
            output.close()  # otherwise Python would warn later that it was never awaited
        raise TypeError(f"{rule}, got a {type(output).__name__}: declare it with `async def`, so that it is awaited.")
    unordered = isinstance(output, (str, bytes, Mapping, AbstractSet))
    if unordered or not (isinstance(output, Iterable) or hasattr(output, "ndim")):
        raise TypeError(f"{rule}, got {_shown(output)} of type {type(output).__name__}. Return a list of floats.")
    array: Any = output
    if getattr(array, "ndim", 1) != 1:
        raise TypeError(
            f"{rule}, got a {type(array).__name__} of shape {tuple(array.shape)}. Reduce it to one dimension, for "
            "instance with `.squeeze(-1)` for a column or `.reshape(1)` for a single number."
        )
    return array.tolist() if hasattr(array, "tolist") else list(array)


def _as_reward(value: Any, index: int, name: str, allow_forbidden: bool) -> float | None:
    if value is None:
        return None
    where = f"The reward function '{name}' returned {_shown(value)} for completion {index}"
    if isinstance(value, torch.Tensor) or (hasattr(value, "item") and getattr(value, "ndim", None) is not None):
        if value.ndim != 0:
            raise TypeError(
                f"{where}, of shape {tuple(value.shape)}: a reward must be one number or None. Return its `.item()`."
            )
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{where}, of type {type(value).__name__}: a reward must be a number or None. Convert it with "
            "`float(...)`, or return None where the reward does not apply."
        )
    try:
        reward = float(value)
    except OverflowError:
        reward = math.inf  # an int beyond any float; its sign does not matter to the rules below
    if math.isnan(reward):
        raise ValueError(f"{where}: a reward must be a finite number. Return None where the reward does not apply.")
    if reward == -math.inf and value == -math.inf and allow_forbidden:
        return reward
    if math.isinf(reward) and value == -math.inf:
        raise ValueError(
            f"{where}: a reward must be finite here, since -inf (a forbidden completion) has no gradient. Return a "
            "large finite penalty, or None where the reward does not apply."
        )
    if abs(reward) > FLOAT32_MAX:
        raise ValueError(
            f"{where}: a reward must be finite in float32 (at most {FLOAT32_MAX:.3g} in size). Scale or clip it in "
            "the function."
        )
    return reward


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
