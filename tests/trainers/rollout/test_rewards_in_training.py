"""Any reward: what it may return, what enters the posterior, and that a bad one ends with its name."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers.integrations import deepspeed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlhf_bayes.lm import Critic
from rlhf_bayes.rewards import RewardEnsemble, RewardModel
from rlhf_bayes.testing import toy_reward
from rlhf_bayes.trainers.rollout import reward_funcs

from ..ppo.test_attach_critic import letter_tokenizer, reward_model, words
from ..training import Recorder, config, logged, prompts_of, trainer

pytestmark = pytest.mark.slow


def first_step(toy, tmp_path, reward_funcs=toy_reward, arguments=None, **changes):
    """Gradients of a first optimizer step, and the trainer."""
    recorder = Recorder()
    args = config(tmp_path, **changes)
    trained = trainer(toy, args, None, reward_funcs, callbacks=[recorder], **(arguments or {}))
    trained.train()
    return recorder.gradients[0], trained


def test_async_and_sync_rewards_are_weighted_and_summed(toy, tmp_path):
    async def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    def first(completion_ids, **kwargs):
        return torch.tensor([ids[0] for ids in completion_ids])

    def both(completion_ids, **kwargs):
        return [0.5 * len(ids) - 2.0 * ids[0] for ids in completion_ids]

    several, trained = first_step(toy, tmp_path, [length, first], reward_weights=[0.5, -2.0])
    one, _ = first_step(toy, tmp_path, both)
    assert_close(several, one)
    assert {"rewards/length/mean", "rewards/first/std"} <= trained.state.log_history[0].keys()


def test_completions_without_a_reward_have_no_influence(toy, tmp_path):
    """Rows with None, whatever their tokens: the gradient is that of the other rows alone."""

    def reward(prompts, completions, completion_ids, **kwargs):
        rewards = toy_reward(prompts, completions, completion_ids)
        return [r if len(ids) == 3 else None for r, ids in zip(rewards, completion_ids, strict=True)]

    # one completion a prompt, so that nothing but a critic that starts at 0 is its baseline
    several = {"train_dataset": prompts_of(toy, 8)}
    gradients, trained = first_step(toy, tmp_path, reward, several, lam=1.0, num_generations=1)
    rollout, batch = trained.rollouts[0], trained.batches[0]
    kept = rollout.completion_mask.sum(-1) == 3
    assert 0 < kept.sum() < len(kept)
    assert_close(batch["loss_mask"], rollout.completion_mask.bool() & kept[:, None])
    tokens = rollout.completion_mask.sum() - rollout.completion_mask.bool()[~kept].sum()
    advantages = rollout.rewards[:, None].expand(-1, 3)[kept]  # zero critic, policy = prior
    assert logged(trained, "ppo/policy_loss")[0] == pytest.approx(-advantages.sum().item() / tokens.item(), rel=1e-5)

    def other(prompts, completions, completion_ids, **kwargs):
        return [r if r is not None else 100.0 for r in reward(prompts, completions, completion_ids)]

    changed, _ = first_step(toy, tmp_path, other, several, lam=1.0, num_generations=1)
    name = "lm_head.weight"
    assert (changed[name] - gradients[name]).abs().max() > 0.1  # such rows would have had an influence


def test_a_batch_without_any_reward_moves_nothing(toy, tmp_path):
    gradients, trained = first_step(toy, tmp_path, lambda completions, **kwargs: [None] * len(completions))
    assert max(gradient.abs().max() for gradient in gradients.values()) == 0
    assert math.isfinite(trained.state.log_history[0]["loss"])


def test_clipping_and_the_eos_penalty_are_part_of_the_reward(toy, tmp_path):
    eos = toy.tokenizer.eos_token_id

    def by_hand(prompts, completions, completion_ids, **kwargs):
        rewards = toy_reward(prompts, completions, completion_ids)
        clipped = [min(max(reward, -0.3), 0.7) for reward in rewards]
        return [r if ids[-1] == eos else r - 1.5 for r, ids in zip(clipped, completion_ids, strict=True)]

    built_in, trained = first_step(toy, tmp_path, reward_clip_range=(-0.3, 0.7), missing_eos_penalty=1.5)
    assert_close(built_in, first_step(toy, tmp_path, by_hand)[0])
    assert set(trained.batches[0]["rewards"].sign().tolist()) == {-1.0, 1.0}
    expected = (trained.batches[0]["rewards"] / 0.5).mean().item()  # policy = prior
    assert logged(trained, "posterior/elbo")[0] == pytest.approx(expected, rel=1e-5)
    plain = first_step(toy, tmp_path)[0]
    assert (built_in["lm_head.weight"] - plain["lm_head.weight"]).abs().max() > 0.1


BAD = {
    "a string": (lambda n: ["high"] * n, TypeError, "'bad' returned 'high' for completion 0"),
    "nan": (lambda n: [0.0] * (n - 1) + [math.nan], ValueError, "'bad' returned nan for completion 23"),
    "infinity": (lambda n: [math.inf] * n, ValueError, "'bad' returned inf for completion 0"),
    "minus infinity": (lambda n: [-math.inf] * n, ValueError, "'bad' must return finite rewards with PPO"),
    "too few": (
        lambda n: [0.0] * (n - 1),
        ValueError,
        "'bad' must return one reward for each of the 24",
    ),
    "a number": (
        lambda n: 1.0,
        TypeError,
        "'bad' must return a number or None for each of the 24",
    ),
    "an exception": (lambda n: 1 / 0, ZeroDivisionError, "division by zero"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("is_async", [True, False])
def test_a_bad_reward_is_named_and_leaves_the_checkpoint(toy, tmp_path, kind, is_async):
    value, error, message = BAD[kind]
    calls = []

    def bad(completions, **kwargs):
        calls.append(1)
        return [0.5] * len(completions) if len(calls) == 1 else value(len(completions))

    async def bad_async(completions, **kwargs):
        return bad(completions)

    bad_async.__name__ = "bad"
    args = config(tmp_path, critic="shared", max_steps=3, save_strategy="steps", save_steps=1)
    trained = trainer(toy, args, None, bad_async if is_async else bad)
    with pytest.raises(error) as caught:
        trained.train()
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert message in text
    assert "'bad'" in text
    assert Critic.from_pretrained(tmp_path / "checkpoint-1" / "critic").value_head.in_features == 32
    resumed = trainer(toy, args, None, toy_reward)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 3


def test_columns_reach_the_reward_function(toy, tmp_path):
    seen = []

    def reward(prompts, completions, answer, trainer_state, log_metric, log_extra, **kwargs):
        log_metric("seen", 3.0)
        seen.extend(zip(prompts, answer, strict=True))
        return [float(value) for value in answer]

    dataset = prompts_of(toy).add_column("answer", [1, 2, 3])
    _, trained = first_step(toy, tmp_path, reward, {"train_dataset": dataset})
    assert set(seen) == set(zip(toy.prompts, (1, 2, 3), strict=True))
    assert logged(trained, "seen") == [3.0]


def test_chat_prompts_train_as_their_template_says(toy, tmp_path):
    # the toy's template gives the tokens of the plain prompts
    chats = prompts_of(toy).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    replies = []

    def reward(prompts, completions, completion_ids, **kwargs):
        replies.extend(completions)
        return toy_reward(prompts, completions, completion_ids)

    gradients, trained = first_step(toy, tmp_path, reward, {"train_dataset": chats})
    assert all(reply[0]["role"] == "assistant" for reply in replies)
    plain, plain_trained = first_step(toy, tmp_path)
    assert torch.equal(trained.rollouts[0].completion_mask, plain_trained.rollouts[0].completion_mask)
    assert_close(gradients, plain)


@pytest.mark.parametrize("as_path", [True, False])
def test_a_reward_model_reads_the_text_with_its_own_tokenizer(toy, tmp_path, as_path):
    model, tokenizer = reward_model(toy), letter_tokenizer()
    source, arguments = model, {"reward_processing_classes": tokenizer}
    if as_path:
        model.save_pretrained(tmp_path / "reward")
        tokenizer.save_pretrained(tmp_path / "reward")
        source, arguments = str(tmp_path / "reward"), {}
    texts = []

    def record(prompts, completions, **kwargs):
        texts.extend(prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    classes = [*arguments.values(), None] if arguments else None
    _, trained = first_step(
        toy, tmp_path, [source, record], {"reward_processing_classes": classes, "peft_config": None}
    )
    model = reward_model(toy).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item() for text in texts]
    assert_close(trained.rollouts[0].rewards, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert trained.rollouts[0].rewards.std() > 0.01


def test_a_broken_reward_model_is_named(toy, tmp_path):
    model = reward_model(toy)
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    model.config._name_or_path = "my/broken-reward"
    with pytest.raises(ValueError, match=r"Reward model `broken-reward` must return finite rewards, got .*nan"):
        first_step(toy, tmp_path, model, {"reward_processing_classes": letter_tokenizer()})


def saved_reward(toy, folder, normalised_on=None):
    """A reward model on disk, normalised on the toy's completions of a prompt."""
    reward = RewardModel(reward_model(toy), letter_tokenizer())
    if normalised_on is not None:
        reward.normalize([normalised_on] * len(toy.completions), toy.completions)
    reward.save_pretrained(folder)
    return reward


def test_a_path_brings_the_normalization_beside_its_weights(toy, tmp_path):
    reward = saved_reward(toy, tmp_path / "good-reward", normalised_on=toy.prompts[0])
    seen = []

    def record(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    _, trained = first_step(toy, tmp_path, [tmp_path / "good-reward", record])
    prompts, completions = zip(*seen, strict=True)
    raw = reward.classifier.logits(prompts, completions)[:, 0]
    expected = raw * reward.normalization.gain[0] + reward.normalization.bias[0]
    assert_close(trained.rollouts[0].rewards, expected, rtol=1e-4, atol=1e-5)
    assert (expected - raw).abs().max() > 0.1
    assert "rewards/good-reward/mean" in trained.state.log_history[0]


def test_an_ensemble_trains_and_logs_its_spread(toy, tmp_path):
    for name in ("a", "b"):
        saved_reward(toy, tmp_path / name, normalised_on=toy.prompts[0] if name == "b" else None)
    ensemble = RewardEnsemble.from_pretrained([tmp_path / "a", tmp_path / "b"])
    ensemble.save_pretrained(tmp_path / "both")
    _, trained = first_step(toy, tmp_path, str(tmp_path / "both"))
    from_path = trained.rollouts[0].rewards
    _, trained_on_instance = first_step(toy, tmp_path, ensemble)
    assert_close(from_path, trained_on_instance.rollouts[0].rewards)
    assert from_path.std() > 0.01
    assert logged(trained, "reward_spread")[0] > 0


def test_a_separate_critic_starts_at_the_reward_model_of_a_path(toy, tmp_path):
    RewardModel(reward_model(toy), words(toy)).save_pretrained(tmp_path / "reward")
    args = config(tmp_path / "out", critic="separate")
    made = trainer(toy, args, None, str(tmp_path / "reward"))
    assert made.critic.value_head.in_features == reward_model(toy).config.hidden_size
    assert_close(made.critic.backbone.state_dict(), reward_model(toy).base_model.state_dict())


def test_paths_and_their_tokenizers_must_match(toy, tmp_path):
    with pytest.raises(ValueError, match="each of the 2 reward functions, got 1"):
        trainer(toy, config(tmp_path), None, ["some/path", toy_reward], reward_processing_classes=toy.tokenizer)


def test_under_zero3_a_path_is_loaded_whole(toy, tmp_path, monkeypatch):
    class Zero3:
        def is_zero3(self):
            return True

    sharding, policy = Zero3(), toy.random_policy(noise=0.0)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    deepspeed.set_hf_deepspeed_config(sharding)
    seen = []

    def load(path, tokenizer, device):
        seen.append((path, is_deepspeed_zero3_enabled(), device))
        raise OSError("no such path")

    monkeypatch.setattr(reward_funcs, "load_reward", load)
    with pytest.raises(OSError, match="no such path"):
        trainer(toy, config(tmp_path), policy, "some/path")
    assert seen == [("some/path", False, torch.device("cpu"))]
    assert is_deepspeed_zero3_enabled()
