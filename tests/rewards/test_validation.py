"""Reward functions keep their nature under `checked`, and what they return is validated."""

import asyncio
import functools
import inspect
import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_bayes.rewards import checked


def returns(output):
    def my_reward(prompts, completions, **kwargs):
        return output

    return my_reward


def call(func, n=3, **kwargs):
    return func(prompts=["p"] * n, completions=["c"] * n, completion_ids=[[1]] * n, **kwargs)


class Lexicon:
    """A callable object."""

    def __init__(self):
        self.scale = 2.0

    def __call__(self, prompts, completions, **kwargs):
        return [self.scale * len(c) for c in completions]


class AsyncJudge:
    async def __call__(self, prompts, completions, **kwargs):
        return [1] * len(prompts)


@pytest.mark.parametrize(
    "output",
    [
        [1, 2.5, True],
        (1, 2.5, 1),
        [np.float32(1), np.int64(2) + 0.5, np.bool_(True)],
        [torch.tensor(1), torch.tensor(2.5), torch.tensor(True)],
        torch.tensor([1, 2.5, 1], requires_grad=True),
        torch.tensor([1, 2.5, 1], dtype=torch.bfloat16),
        np.array([1, 2.5, 1], dtype=np.float16),
        map(float, ["1", "2.5", "1"]),
    ],
    ids=lambda output: type(output).__name__,
)
def test_everything_that_is_a_number_per_completion_is_accepted(output):
    rewards = call(checked(returns(output)))
    assert rewards == [1.0, 2.5, 1.0]
    assert all(type(reward) is float for reward in rewards)


def test_none_is_kept():
    assert call(checked(returns([None, 2, None]))) == [None, 2.0, None]


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ([1.0, 2.0], ValueError, "each of the 3 completions, got 2"),
        ([], ValueError, "each of the 3 completions, got 0"),
        (torch.ones(4), ValueError, "each of the 3 completions, got 4"),
        ("abc", TypeError, "got 'abc' of type str"),
        (1.5, TypeError, "got 1.5 of type float"),
        (None, TypeError, "got None of type NoneType"),
        ({"a": 1, "b": 2, "c": 3}, TypeError, "of type dict"),
        ({1.0, 2.0, 3.0}, TypeError, "of type set"),
        (torch.ones(3, 1), TypeError, r"shape \(3, 1\).*squeeze"),
        (torch.tensor(1.0), TypeError, r"shape \(\)"),
        ([1.0, "2.0", 3.0], TypeError, "'2.0' for completion 1, of type str"),
        ([1.0, 2.0, [3.0]], TypeError, r"\[3.0\] for completion 2, of type list"),
        ([1.0, torch.ones(1), 3.0], TypeError, r"completion 1, of shape \(1,\)"),
        ([1.0, 1j, 3.0], TypeError, "1j for completion 1, of type complex"),
        ([1.0, Decimal("1"), 3.0], TypeError, "completion 1, of type Decimal"),
        ([math.nan, 2.0, 3.0], ValueError, "nan for completion 0"),
        (np.array([1.0, np.nan, 3.0]), ValueError, "nan for completion 1"),
        ([1.0, 2.0, math.inf], ValueError, "inf for completion 2"),
        ([1.0, 2.0, -math.inf], ValueError, "-inf for completion 2.*no gradient"),
        ([1.0, 1e39, 3.0], ValueError, r"1e\+39 for completion 1.*float32"),
        ([1.0, 10**400, 3.0], ValueError, "for completion 1.*float32"),
    ],
)
def test_what_is_not_one_reward_per_completion_is_refused(output, error, message):
    with pytest.raises(error, match=message) as caught:
        call(checked(returns(output)))
    assert "'my_reward'" in str(caught.value)


def test_forbidden_is_minus_infinity_and_only_on_request():
    assert call(checked(returns([1, -math.inf, None]), allow_forbidden=True)) == [1.0, -math.inf, None]
    for reward in (math.inf, math.nan, -1e39, -(10**400)):
        with pytest.raises(ValueError, match="completion 1"):
            call(checked(returns([1, reward, None]), allow_forbidden=True))


def test_name_and_nature_are_kept():
    def plain(prompts, completions, **kwargs):
        """Says nothing."""
        return [0.0] * len(prompts)

    async def judge(prompts, completions, **kwargs):
        return [0.0] * len(prompts)

    for func, name, is_async in (
        (plain, "plain", False),
        (functools.partial(functools.partial(plain, bias=1), scale=2), "plain", False),
        (Lexicon(), "Lexicon", False),
        (judge, "judge", True),
        (functools.partial(judge, model="m"), "judge", True),
        (AsyncJudge(), "AsyncJudge", True),
    ):
        wrapped = checked(func)
        assert wrapped.__name__ == name
        assert inspect.iscoroutinefunction(wrapped) is is_async
        assert wrapped.__wrapped__ is func
        assert not hasattr(wrapped, "scale")
    assert checked(plain).__doc__ == "Says nothing."
    assert call(checked(Lexicon())) == [2.0, 2.0, 2.0]


def test_async_rewards_are_validated_too():
    async def judge(prompts, completions, **kwargs):
        await asyncio.sleep(0)
        return [0.5, None]

    assert asyncio.run(call(checked(judge), n=2)) == [0.5, None]
    with pytest.raises(ValueError, match=r"'judge'.*3 completions, got 2"):
        asyncio.run(call(checked(judge), n=3))


def test_a_coroutine_from_a_sync_function_is_explained():
    async def judge(prompts, completions, **kwargs):
        return [0.5]

    with pytest.raises(TypeError, match="async def"):
        call(checked(lambda **kwargs: judge(**kwargs)), n=1)


def test_every_argument_reaches_the_function():
    def spy(**kwargs):
        return [len(kwargs)]

    assert call(checked(spy), n=1, answer=["a"], trainer_state=None) == [5.0]


def test_an_exception_names_the_function():
    def broken(prompts, completions, **kwargs):
        raise KeyError("answer")

    async def broken_judge(prompts, completions, **kwargs):
        raise KeyError("answer")

    with pytest.raises(KeyError, match="answer") as caught:
        call(checked(broken))
    assert "reward function 'broken'" in caught.value.__notes__[0]
    with pytest.raises(KeyError) as caught:
        asyncio.run(call(checked(broken_judge)))
    assert "reward function 'broken_judge'" in caught.value.__notes__[0]


def test_a_function_without_kwargs_is_told_to_take_them():
    with pytest.raises(TypeError, match="unexpected keyword argument") as caught:
        call(checked(lambda prompts, completions: [1.0]))
    assert "completion_ids=" in caught.value.__notes__[0]
    assert "**kwargs" in caught.value.__notes__[0]


def test_models_and_paths_pass_through():
    module = nn.Linear(1, 1)
    assert checked(module) is module
    assert checked("org/reward-model") == "org/reward-model"


@pytest.mark.parametrize("func", [None, 3, ["f"]])
def test_what_cannot_be_called_is_refused(func):
    with pytest.raises(TypeError, match="`reward_funcs` must hold functions"):
        checked(func)
