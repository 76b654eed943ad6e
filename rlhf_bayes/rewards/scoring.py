"""Runs reward functions on completions, as TRL does."""

import asyncio
import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from rlhf_bayes.rewards.reward_ensemble import load_reward
from rlhf_bayes.rewards.reward_model import RewardModel
from rlhf_bayes.rewards.validation import callable_name, checked, is_async_callable

RewardFunc = Callable | nn.Module | str
PASSED_BY_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
NOT_PASSED_BY_TRL = ("prompt", "completion", "completion_ids")


def distinct_names(names: Iterable[str]) -> list[str]:
    """Names in order, of which the second `judge` is called `judge_2`: each has metrics of its own."""
    given: list[str] = list(names)
    found: list[str] = []
    for name in given:
        number, own = 1, name
        while own in found or (own != name and own in given):
            number += 1
            own = f"{name}_{number}"
        found.append(own)
    return found


@final
class RewardScorer:
    """
    Reward functions of TRL's protocol, ready to run: models are loaded, and everything that they return is checked.

    Args:
        reward_funcs (`Callable`, `torch.nn.Module`, `str`, or a list of these):
            Sync or async functions `f(prompts=, completions=, completion_ids=, **columns, trainer_state=, log_extra=,
            log_metric=)`, sequence-classification models, or paths to such models or to ensembles of them.
        reward_processing_classes (`PreTrainedTokenizerBase` or list, *optional*):
            Tokenizers of the models, in the order of `reward_funcs`, with `None` for functions. Default: the one saved
            beside each model.
        device (`torch.device`, *optional*):
            Where to put models that are loaded from a path.
        allow_forbidden (`bool`, *optional*, defaults to `False`):
            Whether a reward may be `-inf`. See [`checked`].

    Attributes:
        names (`list[str]`): Names of the functions, as TRL logs them.

    Raises:
        `ValueError`: no reward function, or another number of processing classes than of functions.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        reward_processing_classes: Any = None,
        device: torch.device | str | None = None,
        allow_forbidden: bool = False,
    ):
        funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not funcs:
            raise ValueError("`reward_funcs` must hold at least one reward function, got an empty list. Pass one.")
        tokenizers = reward_processing_classes
        if not isinstance(tokenizers, (list, tuple)):
            tokenizers = [None] * len(funcs) if tokenizers is None else [tokenizers]
        if len(tokenizers) != len(funcs):
            raise ValueError(
                f"`reward_processing_classes` must hold one tokenizer for each of the {len(funcs)} reward functions, "
                f"got {len(tokenizers)}. Put None where the function needs none."
            )
        funcs = [_loaded(func, tokenizer, device) for func, tokenizer in zip(funcs, tokenizers, strict=True)]
        self._functions = [checked(func, allow_forbidden) for func in funcs]
        self.names = distinct_names(callable_name(func) for func in self._functions)

    @property
    def functions(self) -> dict[str, Any]:
        """Name -> function, or model of which the function is made, in order."""
        return dict(zip(self.names, self._functions, strict=True))

    def __call__(
        self,
        prompts: Sequence,
        completions: Sequence,
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
        asked: Sequence[bool] | None = None,
    ) -> Tensor:
        """
        Reward of each completion by each function.

        Sync functions run in order, then the async ones at the same time; this also works inside a running event loop,
        as in a notebook.

        Args:
            prompts (`Sequence` of `str` or of chats): B prompts.
            completions (`Sequence` of `str` or of chats): B completions, in the prompt's form.
            completion_ids (`Sequence[Sequence[int]]`): B lists of token ids.
            columns (`Mapping[str, Sequence]`, *optional*):
                Columns of the dataset, with B entries each. As in TRL, `"prompt"` and `"completion"` are not passed
                on.
            asked (`Sequence[bool]`, *optional*): Which of the F functions are called; the others give NaN. Default:
                all.

        Returns:
            `torch.Tensor` of shape `(B, F)`, fp32, on the CPU: NaN where a function returned `None`.

        Raises:
            `TypeError` or `ValueError`: inputs whose lengths or forms do not match, or a reward that is not a number.
        """
        prompts, completions = list(prompts), list(completions)
        ids = [list(row) for row in completion_ids]
        check_rows(prompts, completions, ids)
        kwargs = _checked_columns(columns or {}, len(prompts))
        kwargs |= {"trainer_state": None, "log_extra": _log_nothing, "log_metric": _log_nothing}
        rewards = torch.full((len(prompts), len(self._functions)), torch.nan)  # (B, F)
        called = [index for index in range(len(self._functions)) if asked is None or asked[index]]
        call = {"prompts": prompts, "completions": completions, "completion_ids": ids} | kwargs
        later = [index for index in called if is_async_callable(self._functions[index])]
        for index in called:
            if index not in later:
                rewards[:, index] = _as_tensor(self._functions[index](**call))
        results = _run_together([self._functions[index](**call) for index in later])
        for index, result in zip(later, results, strict=True):
            rewards[:, index] = _as_tensor(result)
        return rewards


def score(
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    prompts: Sequence,
    completions: Sequence,
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence] | None = None,
    reward_processing_classes: Any = None,
    allow_forbidden: bool = False,
) -> Tensor:
    """
    Reward of each completion by each function: (B, F), fp32, NaN for `None`.

    Use [`RewardScorer`] to score more than once with models that are loaded from a path.

    Args:
        reward_funcs, reward_processing_classes, allow_forbidden: As in [`RewardScorer`].
        prompts, completions, completion_ids, columns: As in [`RewardScorer.__call__`].
    """
    scorer = RewardScorer(reward_funcs, reward_processing_classes, allow_forbidden=allow_forbidden)
    return scorer(prompts, completions, completion_ids, columns)


def check_rows(prompts: Sequence, completions: Sequence, completion_ids: Sequence) -> None:
    """
    Refuse batches whose parts do not fit together.

    Raises:
        `ValueError`: if a part does not have one entry for each row.
        `TypeError`: if a completion does not have its prompt's form (text, or a list of messages).
    """
    if not len(prompts) == len(completions) == len(completion_ids):
        raise ValueError(
            "`prompts`, `completions` and `completion_ids` must have one entry for each row, got "
            f"{len(prompts)}, {len(completions)} and {len(completion_ids)}. Repeat the prompt for each of its "
            "completions."
        )
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if isinstance(prompt, str) != isinstance(completion, str):
            raise TypeError(
                "`completions` must have the form of `prompts`: texts for texts, lists of messages for chats; row "
                f"{row} has a {type(prompt).__name__} and a {type(completion).__name__}. For a chat, pass "
                '`[{"role": "assistant", "content": text}]`.'
            )


def _loaded(func: Any, tokenizer: Any, device: torch.device | str | None) -> Any:
    if isinstance(func, (str, Path)):
        return load_reward(func, tokenizer, device)
    return RewardModel(func, tokenizer, device) if isinstance(func, nn.Module) else func


def _checked_columns(columns: Mapping[str, Sequence], num_rows: int) -> dict[str, Any]:
    kept = {}
    for name, values in columns.items():
        if name in NOT_PASSED_BY_TRL:
            continue
        if name in PASSED_BY_TRL:
            raise ValueError(
                f"`columns` must not hold '{name}': reward functions get an argument of that name. Rename the column."
            )
        if isinstance(values, str) or len(values) != num_rows:
            raise ValueError(
                f"`columns['{name}']` must have one entry for each of the {num_rows} rows, got "
                f"{repr(values) if isinstance(values, str) else len(values)}. Repeat the entry of a prompt for each "
                "of its completions."
            )
        kept[name] = list(values)
    return kept


def _as_tensor(rewards: list[float | None]) -> Tensor:
    return torch.tensor([torch.nan if reward is None else reward for reward in rewards], dtype=torch.float32)


def _log_nothing(name: str, values: Any) -> None:
    """Stands for `log_extra` and `log_metric`, which do nothing outside of a trainer."""


def _run_together(coroutines: list) -> list:
    if not coroutines:
        return []

    async def gather() -> list:
        return await asyncio.gather(*coroutines)

    return asyncio.run_coroutine_threadsafe(gather(), _event_loop(os.getpid())).result()


@functools.cache
def _event_loop(process_id: int) -> asyncio.AbstractEventLoop:
    # One event loop is kept in a thread of its own. A caller inside a running loop cannot start another one, and
    # clients that a reward function keeps open (HTTP, gRPC) belong to the loop in which they were first used. Threads
    # do not survive a fork, so the argument makes a new loop for each process.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"rlhf-bayes-rewards-{process_id}", daemon=True).start()
    return loop
