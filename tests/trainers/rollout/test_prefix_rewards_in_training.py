"""Which rewards a trainer asks of prefixes, and that the critic reads what calls on the prefixes give."""

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

from rlhf_bayes import PPOConfig
from rlhf_bayes.likelihoods import ProductLikelihood, RewardLikelihood
from rlhf_bayes.rewards import RewardModel, takes_prefixes
from rlhf_bayes.testing import toy_reward
from rlhf_bayes.trainers.rollout.reward_funcs import functions_of_prefixes

from ..ppo.test_attach_critic import letter_tokenizer, reward_model, words
from ..training import config, trainer

BETA = PPOConfig.__dataclass_fields__["beta"].default  # a likelihood has no β
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def rewards_of_prefixes(toy, rollout, score, prompts):
    """r of each prefix from a call on it: (B, T), 0 where there is none; `prompts` are those of the rollout."""
    expected = torch.zeros(rollout.completion_ids.shape)
    for row, (ids, mask) in enumerate(zip(rollout.completion_ids, rollout.completion_mask, strict=True)):
        for stop in range(1, int(mask.sum())):
            text = toy.tokenizer.decode(ids[:stop], skip_special_tokens=True)
            expected[row, stop] = score(prompts[row], text)
    return expected


def prompts_of_rows(toy, rollout):
    return [
        toy.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    ]


@pytest.mark.parametrize("form", ["module", "other tokens", "path"])
def test_a_causal_reward_model_is_asked_by_default(toy, tmp_path, form):
    model, tokenizer = reward_model(toy), letter_tokenizer() if form == "other tokens" else words(toy)
    reward = model
    if form == "path":
        RewardModel(model, tokenizer).save_pretrained(tmp_path / "reward")
        reward = str(tmp_path / "reward")
    model.train()
    classes = {"reward_processing_classes": [tokenizer, None]}
    args = config(tmp_path, reward_weights=[0.5, 1.0])
    made = trainer(toy, args, None, [reward, toy_reward], **classes)
    assert list(made.asked_for_prefixes) == [0]
    assert form == "path" or model.training  # as the caller left it
    passes = []
    model.register_forward_hook(lambda *arguments: passes.append(1))
    made.train()
    (rollout,) = made.rollouts
    assert form == "path" or len(passes) == 2  # the rewards, and all prefixes
    one = RewardModel(model, tokenizer)
    expected = rewards_of_prefixes(
        toy, rollout, lambda prompt, text: 0.5 * one([prompt], [text])[0], prompts_of_rows(toy, rollout)
    )
    assert expected.std() > 0.01
    assert_close(rollout.prefix_rewards, expected, rtol=1e-4, atol=1e-5)
    without = trainer(toy, config(tmp_path, prefix_rewards=False), None, [reward, toy_reward], **classes)
    assert not without.asked_for_prefixes


def test_chats_are_closed_after_each_prefix(toy, tmp_path):
    model, tokenizer = reward_model(toy), words(toy)
    tokenizer.chat_template = CHAT_TEMPLATE
    chats = [[{"role": "user", "content": prompt}] for prompt in toy.prompts]
    arguments = {"train_dataset": Dataset.from_dict({"prompt": chats}), "reward_processing_classes": tokenizer}
    made = trainer(toy, config(tmp_path), None, model, **arguments)
    made.train()
    (rollout,) = made.rollouts
    one, of_ids = RewardModel(model, tokenizer), {}
    for chat in chats:
        ids = made.processing_class.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        of_ids[tuple(ids)] = chat

    def score(chat, text):
        return one([chat], [[{"role": "assistant", "content": text}]])[0]

    prompts = [
        of_ids[tuple(ids[mask.bool()].tolist())]
        for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    ]
    assert_close(rollout.prefix_rewards, rewards_of_prefixes(toy, rollout, score, prompts), rtol=1e-4, atol=1e-5)


def test_of_evidence_the_parts_that_take_prefixes_are_asked(toy, tmp_path):
    @takes_prefixes
    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    likelihood = ProductLikelihood([RewardLikelihood(toy_reward, 0.5), RewardLikelihood(length, 4.0)])
    made = trainer(toy, config(tmp_path, beta=BETA), likelihood=likelihood)
    made.train()
    (rollout,) = made.rollouts
    expected = rewards_of_prefixes(toy, rollout, lambda prompt, text: len(text) / 4, [""] * len(rollout.rewards))
    assert_close(rollout.prefix_rewards, expected)
    # the features of the completions are reported, not those of the prefixes
    assert {name: len(values) for name, values in rollout.features.items()} == {"reward": 24, "reward_2": 24}
    plain = trainer(toy, config(tmp_path, beta=BETA), likelihood=RewardLikelihood(toy_reward, 0.5))
    assert not plain.asked_for_prefixes
    one = {"prompts": ["a"], "completions": ["b"], "completion_ids": [[1]]}
    assert functions_of_prefixes(plain, True)[0](**one) == pytest.approx([2 * toy_reward(**one)[0]])


def test_a_function_around_a_causal_model_shares_the_pass(toy, tmp_path):
    model = RewardModel(reward_model(toy), words(toy))
    passes = []
    model.model.register_forward_hook(lambda *arguments: passes.append(1))

    @takes_prefixes
    def negated(prompts, completions, **columns):
        return [-reward for reward in model(prompts, completions)]

    made = trainer(toy, config(tmp_path), None, negated)
    made.train()
    assert len(passes) == 2 + 2  # two more find out whether the model is causal


def test_a_sharded_reward_model_is_not_asked(toy, tmp_path, monkeypatch):
    made = trainer(toy, config(tmp_path), None, reward_model(toy), reward_processing_classes=words(toy))
    assert functions_of_prefixes(made, None)
    monkeypatch.setattr(type(made), "sharded", property(lambda self: True))
    assert not functions_of_prefixes(made, None)
    with pytest.raises(ValueError, match="`prefix_rewards` must be left out with the reward model"):
        functions_of_prefixes(made, True)
