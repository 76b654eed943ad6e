"""Rewards of prefixes: against the reward function itself, called on one decoded prefix at a time."""

import pytest
import torch

from rlhf_bayes.rewards import takes_prefixes
from rlhf_bayes.rewards.prefix_rewards import prefix_rewards

from ..trainers.training import config, trainer


@takes_prefixes
def count_b(completions, shift, **columns):
    return [text.count("b") + s for text, s in zip(completions, shift, strict=True)]


def only_long(completions, **columns):
    return [None if len(text.split()) < 2 else 5.0 for text in completions]


def ids_of(toy, texts):
    return [toy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_every_prefix_has_the_reward_of_its_text(toy):
    words = [token for token in toy.tokenizer.get_vocab() if not token.startswith("<")][:2]
    ids = ids_of(toy, [f"{words[0]} {words[1]} {words[0]}", words[1], f"{words[1]} {words[1]}"])
    lengths = [len(row) for row in ids]

    def count(completions, shift, **columns):
        return [text.count(words[1]) + s for text, s in zip(completions, shift, strict=True)]

    inputs = [{"prompt": "p", "shift": shift} for shift in (0.5, 10.0, 20.0)]
    found = prefix_rewards([count, only_long], toy.tokenizer, inputs, ["p"] * 3, ids)
    assert found.shape == (3, 3, 2)
    for row, (row_ids, shift) in enumerate(zip(ids, (0.5, 10.0, 20.0), strict=True)):
        for t in range(1, lengths[row]):
            text = toy.tokenizer.decode(row_ids[:t], skip_special_tokens=True)
            assert found[row, t, 0] == pytest.approx(text.count(words[1]) + shift)
            assert found[row, t, 1].item() == pytest.approx(5.0 if len(text.split()) >= 2 else torch.nan, nan_ok=True)
        assert found[row, 0].isnan().all()
        assert found[row, lengths[row] :].isnan().all()


def test_chats_are_asked_as_chats(toy):
    def last_role(prompts, completions, completion_ids, **columns):
        assert all(isinstance(prompt, list) for prompt in prompts)
        roles = [turn[-1]["role"] for turn in completions]
        return [len(ids) if role == "assistant" else -1.0 for role, ids in zip(roles, completion_ids, strict=True)]

    chat = [{"role": "user", "content": "hi"}]
    ids = [[2, 2, 2], [2]]
    found = prefix_rewards([last_role], toy.tokenizer, [{"prompt": chat}] * 2, [chat] * 2, ids)
    assert found.nan_to_num(-5.0).squeeze(-1).tolist() == [[-5.0, 1.0, 2.0], [-5.0, -5.0, -5.0]]


def test_a_function_that_cannot_be_asked_is_refused_before_training(toy, tmp_path):
    async def slow(completions, **columns):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"`prefix_rewards` must be left out, or False, .*'slow', which is async"):
        trainer(toy, config(tmp_path, critic="ridge", prefix_rewards=True), None, slow)


def of_ids(completion_ids, **columns):
    return [sum(ids) - 0.1 * len(ids) ** 2 for ids in completion_ids]


@pytest.mark.parametrize("asked", [True, None])
def test_a_trainer_asks_for_them_and_learns_from_the_rewards_of_whole_completions(toy, tmp_path, asked):
    sizes = []

    def reward(completion_ids, **columns):
        sizes.append(len(completion_ids))
        return of_ids(completion_ids)

    trained = trainer(toy, config(tmp_path, critic="ridge", prefix_rewards=asked, max_steps=2), None, reward)
    trained.train()
    rollout = trained.rollouts[1]
    ids = [
        row[mask.bool()].tolist() for row, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    ]
    assert rollout.rewards.tolist() == pytest.approx(of_ids(ids))
    if asked is None:
        assert rollout.prefix_rewards is None
        assert sizes == [24, 24]
        return
    for row, completion in enumerate(ids):
        prefixes = [completion[:t] for t in range(1, len(completion))]
        assert rollout.prefix_rewards[row, 1 : len(completion)].tolist() == pytest.approx(of_ids(prefixes))
    assert len(sizes) == 4  # completions and their prefixes, twice


def test_a_reward_that_fails_on_prefixes_stops_the_run_as_any_other(toy, tmp_path):
    def reward(completion_ids, **columns):
        if len(completion_ids) != 24:
            raise RuntimeError("not of prefixes")
        return of_ids(completion_ids)

    trained = trainer(toy, config(tmp_path, critic="ridge", prefix_rewards=True), None, reward)
    with pytest.raises(RuntimeError, match="not of prefixes"):
        trained.train()
