"""Reward functions that raise or hang: called again, and at last the run stops where it can go on."""

import asyncio
import threading

import pytest
import torch

from rlhf_bayes import GDCConfig, PPOConfig
from rlhf_bayes.testing import toy_reward
from rlhf_bayes.trainers.faults import reward_retries
from rlhf_bayes.trainers.faults.reward_retries import in_time, retried

from ...children import STALLED_AFTER
from .test_resumed_runs import assert_same_weights, make

pytestmark = pytest.mark.slow


class Unreliable:
    """The toy's reward, failing at some of its calls."""

    def __init__(self, *failing, hangs=False, draws=False):
        self.failing, self.hangs, self.draws, self.calls = failing, hangs, draws, 0
        self.done = threading.Event()

    def __call__(self, prompts, completions, completion_ids, **columns):
        self.calls += 1
        if self.calls in self.failing:
            if self.draws:
                torch.rand(3)
            if self.hangs:
                self.done.wait(STALLED_AFTER)
            raise ConnectionError("the judge is away")
        return toy_reward(prompts, completions, completion_ids)


@pytest.fixture
def waits(monkeypatch):
    """Seconds between calls, not waited for."""
    waited = []
    monkeypatch.setattr(reward_retries.time, "sleep", waited.append)
    return waited


def with_reward(kind, toy, folder, reward, **changes):
    run = make(kind, toy, folder, save_steps=5, **changes)
    failures = run._failures.errors
    run.reward_funcs = [retried(reward, run.args.reward_timeout, run.args.reward_retries, failures)]
    return run


@pytest.mark.parametrize("kind", ["ppo", "gdc"])
@pytest.mark.parametrize("hangs", [False, True])
def test_one_failure_changes_nothing(kind, hangs, toy, tmp_path, waits, caplog):
    whole = make(kind, toy, tmp_path / "whole")
    whole.train()
    reward = Unreliable(2, 4, 5, hangs=hangs)
    options = {"reward_retries": 2, "reward_timeout": 2.0 if hangs else None}
    run = with_reward(kind, toy, tmp_path / "run", reward, **options)
    run.train()
    reward.done.set()
    assert reward.calls == 9  # of 6 rollouts
    assert waits == [1.0, 1.0, 2.0]
    what = "did not return within `reward_timeout` = 2 seconds" if hangs else "ConnectionError: the judge is away"
    assert what in caplog.text
    assert_same_weights(run, whole)


@pytest.mark.parametrize("kind", ["ppo", "gdc"])
def test_when_nothing_helps_the_run_stops_and_goes_on_as_if_nothing_had_been(kind, toy, tmp_path, waits):
    whole = make(kind, toy, tmp_path / "whole", logging_steps=2)
    whole.train()
    run = with_reward(kind, toy, tmp_path / "run", Unreliable(4, 5, draws=True), reward_retries=1, logging_steps=2)
    with pytest.raises(ConnectionError, match="the judge is away") as caught:
        run.train()
    notes = "\n".join(caught.value.__notes__)
    assert "The reward function 'Unreliable' failed 2 times (`reward_retries` = 1)." in notes
    assert "Training stopped at step 3." in notes
    assert "checkpoint-3`: go on from it" in notes
    resumed = make(kind, toy, tmp_path / "run", logging_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, whole)
    own = ("loss", "_runtime", "_per_second", "step_time", "total_flos")
    for ours, theirs in zip(resumed.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        assert {n: v for n, v in ours.items() if not n.endswith(own)} == {
            n: v for n, v in theirs.items() if not n.endswith(own)
        }


def test_nothing_is_saved_before_the_first_step_or_twice_or_against_ones_will(toy, tmp_path):
    for folder, failing, changes, expected in (
        ("first", 1, {}, []),
        ("saved", 6, {}, [5]),
        ("never", 4, {"save_strategy": "no"}, []),
    ):
        run = with_reward("ppo", toy, tmp_path / folder, Unreliable(failing), **changes)
        with pytest.raises(ConnectionError) as caught:
            run.train()
        assert sorted(path.name for path in (tmp_path / folder).glob("checkpoint-*")) == [
            f"checkpoint-{step}" for step in expected
        ]
        assert ("there is no checkpoint to resume from" in "\n".join(caught.value.__notes__)) == (not expected)


def test_a_failure_in_an_evaluation_saves_what_was_learnt(toy, tmp_path):
    run = with_reward("ppo", toy, tmp_path, Unreliable(4), eval_strategy="steps", eval_steps=3)
    with pytest.raises(ConnectionError):
        run.train()
    resumed = make("ppo", toy, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6


def test_async_functions_are_cancelled_and_called_again(monkeypatch):
    calls, cancelled, failures = [], [], []

    async def judge(prompts, completions, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            try:
                await asyncio.sleep(STALLED_AFTER)
            except asyncio.CancelledError:
                cancelled.append(1)
                raise
        if len(calls) == 2:
            raise ConnectionError("away")
        return [1.0] * len(completions)

    monkeypatch.setattr(reward_retries, "FIRST_WAIT", 0.0)
    patient = retried(judge, 0.05, 2, failures)
    assert patient.__name__ == "judge"
    assert asyncio.run(patient(["a"], ["b"])) == [1.0]
    assert (len(calls), cancelled, failures) == (3, [1], [])
    calls.clear()
    assert asyncio.run(retried(judge, 0.05, 0, failures)(["a"], ["b"])) == [0.0]
    assert "'judge' did not return within `reward_timeout` = 0.05 seconds" in str(failures[0])


def test_a_call_with_a_deadline_is_like_one_without():
    def call():
        assert threading.current_thread() is not threading.main_thread()
        return torch.is_grad_enabled()

    with torch.no_grad():
        assert in_time(call, STALLED_AFTER) is False
    assert in_time(call, STALLED_AFTER) is True
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0, STALLED_AFTER)
    end, ended = threading.Event(), []
    with pytest.raises(TimeoutError):
        in_time(lambda: ended.append(end.wait(STALLED_AFTER)), 0.05)
    assert not ended
    end.set()


def test_modules_are_left_alone():
    module = torch.nn.Linear(1, 1)
    assert retried(module, 1.0, 1, []) is module


@pytest.mark.parametrize("config", [PPOConfig, GDCConfig])
def test_numbers_are_checked(config, tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match=r"`reward_timeout` must be positive \(seconds\), or None, got 0"):
        config(**common, reward_timeout=0)
    with pytest.raises(ValueError, match="`reward_retries` must be at least 0, got -1"):
        config(**common, reward_retries=-1)
