"""Rewards of the prefixes of completions, which a critic may read: they reduce noise, and never change the target."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_bayes.rewards.scoring import NOT_PASSED_BY_TRL, PASSED_BY_TRL
from rlhf_bayes.rewards.token_trees import shared_beginnings
from rlhf_bayes.rewards.validation import callable_name, is_async_callable

_MARK = "takes_prefixes"
Function = TypeVar("Function", bound=Callable)


def takes_prefixes(func: Function) -> Function:
    """
    Mark a reward function that may be asked for the reward of a prefix of a completion, by a decorator.

    Say so of a function that has a meaning on half a text and costs little, such as one that looks up words: it is
    called on as many texts as there are tokens. `PPOTrainer` then uses these rewards to tell which token earned what.
    The reward of a completion, and so the optimum, stays what it is.

    Reward models of this package say so by themselves where they are causal: all prefixes of a text take one pass
    then. Say so of a function that calls such a model too: the pass is shared within it as well.
    """
    setattr(func, _MARK, True)
    return func


def takes_prefixes_of(func: Any) -> bool:
    """Whether a reward function, perhaps inside of [`checked`], says that it may be asked of prefixes."""
    return bool(getattr(getattr(func, "__wrapped__", func), _MARK, False))


def check_can_be_asked(reward_funcs: Sequence[Any], asked: bool | None) -> None:
    """
    Refuse `prefix_rewards=True` where a reward function cannot be asked of prefixes.

    Raises:
        ValueError: if `asked` is True, and a function is async.
    """
    for func in reward_funcs if asked else ():
        if is_async_callable(func):
            raise ValueError(
                f"`prefix_rewards` must be left out, or False, with the reward function '{callable_name(func)}', "
                "which is async: it would be called on as many texts as there are tokens. Leave it out, and mark "
                "the functions that can be asked with the decorator `rlhf_bayes.rewards.takes_prefixes`."
            )


def prefix_rewards(
    reward_funcs: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[dict[str, Any]],
    prompts: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
) -> Tensor:
    """
    The rewards of the first t tokens of each completion, for t = 0, …, T − 1: (B, T, F), on the CPU.

    It is nan for t = 0, on padding, and where a function returns `None`. Classifiers that can do so read all prefixes
    of a completion in one pass: see [`shared_beginnings`].

    Args:
        reward_funcs (`Sequence`):
            F functions of TRL's protocol.
        tokenizer (`PreTrainedTokenizerBase`):
            Decodes the prefixes; special tokens are skipped, as TRL does.
        inputs (`Sequence[dict]`):
            The rows of the dataset, one for each completion.
        prompts, completion_ids:
            Of each completion.
    """
    lengths = [len(ids) for ids in completion_ids]
    rows = [row for row, length in enumerate(lengths) for _ in range(1, length)]
    prefixes = [list(ids[:stop]) for ids in completion_ids for stop in range(1, len(ids))]
    texts = tokenizer.batch_decode(prefixes, skip_special_tokens=True)
    chat = not isinstance(prompts[0], str)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    names = [name for name in inputs[0] if name not in (*NOT_PASSED_BY_TRL, *PASSED_BY_TRL)]
    columns = {name: [inputs[row][name] for row in rows] for name in names}
    columns |= {"prompts": [prompts[row] for row in rows], "completions": completions, "completion_ids": prefixes}
    with shared_beginnings():
        by_function = [
            [torch.nan if reward is None else reward for reward in func(**columns)] if rows else []
            for func in reward_funcs
        ]
    rewards = torch.tensor(by_function, dtype=torch.float32).view(len(reward_funcs), -1).T  # (N, F)
    stops = torch.arange(max(lengths, default=0))  # (T,)
    asked = (stops > 0) & (stops < torch.tensor(lengths)[:, None])  # (B, T), in the order of `prefixes`
    result = torch.full((*asked.shape, len(reward_funcs)), torch.nan)
    result[asked] = rewards
    return result
