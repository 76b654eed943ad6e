"""Reward functions that may fail or hang: they have a time limit, are called again, and never crash the run."""

import asyncio
import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlhf_bayes.rewards.validation import callable_name, is_async_callable

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds between two calls. The wait doubles each time, up to the longest."""


def retried(func: Any, timeout: float | None, retries: int, failures: list[Exception]) -> Any:
    """
    The same reward function, which is called again where it raises or takes too long.

    When all calls fail, the last error is put into `failures` and the rewards are zeros, which must not be used. The
    function returns, rather than raises, since other processes wait for this one at the next gather: only after that
    can all of them stop together.

    Args:
        func (`Callable` or `torch.nn.Module`):
            As [`~rlhf_bayes.rewards.checked`] returns it. A module has another protocol and is returned as it is.
        timeout (`float`, *optional*):
            Seconds for one call. A function that is not async is then called in a thread. A thread cannot be stopped,
            so the call may still run beside the next one.
        retries (`int`):
            Number of calls after the first.
        failures (`list[Exception]`):
            The last error is appended to it.
    """
    if isinstance(func, nn.Module):
        return func
    name = callable_name(func)
    if is_async_callable(func):
        wrapper: Any = _retried_async(func, name, timeout, retries, failures)
    else:
        wrapper = _retried_sync(func, name, timeout, retries, failures)
    wrapper.__name__ = wrapper.__qualname__ = name
    wrapper.__doc__ = func.__doc__
    wrapper.__wrapped__ = getattr(func, "__wrapped__", func)  # what the user passed
    return wrapper


def _retried_sync(func, name, timeout, retries, failures) -> Callable:
    def call(prompts, completions, **kwargs):
        for attempt in range(retries + 1):
            try:
                return in_time(lambda: func(prompts=prompts, completions=completions, **kwargs), timeout)
            except Exception as error:
                wait = _next_wait(name, _named(error, name, timeout), attempt, retries, failures)
            if wait is not None:
                time.sleep(wait)
        return [0.0] * len(completions)

    return call


def _retried_async(func, name, timeout, retries, failures) -> Callable:
    async def call(prompts, completions, **kwargs):
        for attempt in range(retries + 1):
            try:
                return await asyncio.wait_for(func(prompts=prompts, completions=completions, **kwargs), timeout)
            except Exception as error:
                wait = _next_wait(name, _named(error, name, timeout), attempt, retries, failures)
            if wait is not None:
                await asyncio.sleep(wait)
        return [0.0] * len(completions)

    return call


def in_time(call: Callable[[], Any], timeout: float | None) -> Any:
    """
    The result of a call, which runs in a thread of its own where there is a timeout.

    Raises:
        TimeoutError: if the call takes longer than `timeout` seconds.
    """
    if timeout is None:
        return call()
    results: queue.SimpleQueue = queue.SimpleQueue()
    with_gradient = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run():
        # torch keeps the current device and the gradient mode per thread, so the new thread gets the caller's
        if device is not None:
            torch.cuda.set_device(device)
        try:
            with torch.set_grad_enabled(with_gradient):
                results.put((call(), None))
        except BaseException as error:
            results.put((None, error))

    # a daemon thread, so that a function that hangs does not keep the process from exiting
    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    try:
        result, error = results.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def _named(error: Exception, name: str, timeout: float | None) -> Exception:
    if isinstance(error, TimeoutError) and not error.args:
        return TimeoutError(
            f"The reward function '{name}' did not return within `reward_timeout` = {timeout:g} seconds."
        )
    return error


def _next_wait(name: str, error: Exception, attempt: int, retries: int, failures: list[Exception]) -> float | None:
    """Seconds until the next call; None if there is no further call."""
    if attempt == retries:
        if retries:
            error.add_note(f"The reward function '{name}' failed {retries + 1} times (`reward_retries` = {retries}).")
        failures.append(error)
        return None
    wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
    logger.warning(
        f"The reward function '{name}' failed, call {attempt + 1} of {retries + 1}: {type(error).__name__}: {error}. "
        f"It is called again in {wait:g} s."
    )
    return wait
