"""Scoring: the protocol of TRL, sync and async, and inputs that do not belong together."""

import asyncio
import math
import multiprocessing

import pytest
import torch

from rlhf_bayes.rewards import RewardScorer, score

from ..children import STALLED_AFTER, wait_until

NAN = math.nan


def length(completions, **kwargs):
    return [len(completion) for completion in completions]


def sometimes(completions, **kwargs):
    return [None if "b" in completion else 0.5 for completion in completions]


async def judge(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [len(prompt) - len(completion) for prompt, completion in zip(prompts, completions, strict=True)]


PROMPTS, COMPLETIONS, IDS = ["pp", "q", "r"], ["a", "ab", "ccc"], [[1], [1, 2], [3, 3, 3]]
EXPECTED = torch.tensor([[1.0, 1.0, 0.5], [-1.0, 2.0, NAN], [-2.0, 3.0, 0.5]])


def test_sync_async_and_none_in_their_columns():
    rewards = score([judge, length, sometimes], PROMPTS, COMPLETIONS, IDS)
    assert rewards.dtype is torch.float32
    torch.testing.assert_close(rewards, EXPECTED, equal_nan=True)


def test_inside_a_running_event_loop():
    async def notebook_cell():
        return score([judge, length, sometimes], PROMPTS, COMPLETIONS, IDS)

    torch.testing.assert_close(asyncio.run(notebook_cell()), EXPECTED, equal_nan=True)


def test_async_functions_run_at_the_same_time():
    # each waits for the other: one after the other would never end
    met = {}

    def meets(me, other):
        async def func(completions, **kwargs):
            met.setdefault(me, asyncio.Event()).set()
            await asyncio.wait_for(met.setdefault(other, asyncio.Event()).wait(), timeout=STALLED_AFTER)
            return [1.0] * len(completions)

        return func

    rewards = score([meets("a", "b"), meets("b", "a")], PROMPTS, COMPLETIONS, IDS)
    assert rewards.tolist() == [[1.0, 1.0]] * 3


def test_a_client_lives_through_several_calls():
    loops = set()

    async def client(completions, **kwargs):
        loops.add(asyncio.get_running_loop())
        return [0.0] * len(completions)

    scorer = RewardScorer(client)
    for _ in range(2):
        scorer(PROMPTS, COMPLETIONS, IDS)
    assert len(loops) == 1
    assert not loops.pop().is_closed()


def _score_in_child(queue):
    queue.put(score(judge, PROMPTS, COMPLETIONS, IDS).tolist())


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_loop_of_its_own():
    score(judge, PROMPTS, COMPLETIONS, IDS)  # the parent's thread runs, and does not survive the fork
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_score_in_child, args=(queue,), daemon=True)
    child.start()
    wait_until(lambda: not queue.empty() or not child.is_alive(), [child.pid])
    answered = not queue.empty()
    result = queue.get() if answered else None
    child.kill()
    child.join()
    assert result == EXPECTED[:, :1].tolist()


def test_functions_get_what_trl_gives_them():
    seen = {}

    def spy(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(ids=completion_ids, answer=answer, state=trainer_state, rest=kwargs)
        log_extra("answer", answer)
        log_metric("accuracy", 0.5)
        return [0.0] * len(prompts)

    columns = {"answer": ("x", "y", "z"), "prompt": PROMPTS, "completion": PROMPTS, "completion_ids": IDS}
    score(spy, PROMPTS, COMPLETIONS, IDS, columns)
    assert seen == {"ids": IDS, "answer": ["x", "y", "z"], "state": None, "rest": {}}


def test_functions_and_models_together(bert, bert_tokenizer):
    scorer = RewardScorer([length, bert, judge], [None, bert_tokenizer, None])
    assert scorer.names == ["length", "BertForSequenceClassification", "judge"]
    rewards = scorer(PROMPTS, COMPLETIONS, IDS)
    torch.testing.assert_close(rewards[:, [2, 0]], EXPECTED[:, :2])
    assert rewards[:, 1].std() > 0


def test_an_async_failure_reaches_the_caller():
    async def broken(**kwargs):
        raise ConnectionError("no server")

    with pytest.raises(ConnectionError, match="no server") as caught:
        score([judge, broken], PROMPTS, COMPLETIONS, IDS)
    assert "'broken'" in caught.value.__notes__[0]


@pytest.mark.filterwarnings("error")
def test_a_sync_failure_leaves_no_coroutine_behind():
    def broken(**kwargs):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        score([judge, broken], PROMPTS, COMPLETIONS, IDS)


def test_forbidden_only_on_request():
    def forbid(completions, **kwargs):
        return [-math.inf] * len(completions)

    with pytest.raises(ValueError, match="'forbid' returned -inf for completion 0"):
        score(forbid, PROMPTS, COMPLETIONS, IDS)
    assert score(forbid, PROMPTS, COMPLETIONS, IDS, allow_forbidden=True).eq(-math.inf).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((PROMPTS, COMPLETIONS[:2], IDS), ValueError, "one entry for each row, got 3, 2 and 3"),
        ((PROMPTS, COMPLETIONS, IDS[:1]), ValueError, "one entry for each row, got 3, 3 and 1"),
        (([[{"role": "user", "content": "p"}]], ["a"], [[1]]), TypeError, "row 0 has a list and a str.*assistant"),
        ((PROMPTS, COMPLETIONS, IDS, {"answer": ["x"]}), ValueError, r"`columns\['answer'\]`.*3 rows, got 1"),
        ((PROMPTS, COMPLETIONS, IDS, {"answer": "xyz"}), ValueError, r"`columns\['answer'\]`.*3 rows, got 'xyz'"),
        ((PROMPTS, COMPLETIONS, IDS, {"prompts": PROMPTS}), ValueError, "must not hold 'prompts'"),
    ],
)
def test_what_does_not_belong_together_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        score(length, *arguments)


def test_reward_funcs_and_their_tokenizers_must_match(bert, bert_tokenizer):
    with pytest.raises(ValueError, match="`reward_funcs` must hold at least one"):
        RewardScorer([])
    with pytest.raises(ValueError, match="each of the 2 reward functions, got 1"):
        RewardScorer([length, bert], bert_tokenizer)
    with pytest.raises(TypeError, match=r"`reward_funcs` must hold functions.*got 3"):
        RewardScorer([length, 3])
