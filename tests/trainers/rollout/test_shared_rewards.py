"""Reward models that are adapters on the policy's base: one base in memory, and the reward of one of their own."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_bayes import GDCConfig, GDCTrainer
from rlhf_bayes.rewards import RewardEnsemble, RewardIndex, RewardModel, load_reward
from rlhf_bayes.testing import toy_reward
from rlhf_bayes.trainers.rollout.shared_rewards import SharedReward

from ..ppo.test_attach_critic import words
from ..training import QUIET, config, prompts_of, trainer, weights

pytestmark = pytest.mark.slow

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def reward_adapters(base, num_members=1, num_labels=1, **changes):
    """Random adapters and heads, on other layers than the policy's."""
    torch.manual_seed(7)
    defaults = {"task_type": "SEQ_CLS", "r": 3, "target_modules": ["v_proj", "up_proj"], "lora_dropout": 0.5}
    lora = LoraConfig(**defaults | changes)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels), lora)
    for member in range(1, num_members):
        model.add_adapter(f"member_{member}", lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5)
    return model


def saved_reward(toy, base, folder, kind="single"):
    """A normalised reward model or ensemble, and its base, on disk."""
    changes = {"single": {}, "lora": {"num_members": 3}, "heads": {"num_labels": 3}}[kind]
    model, tokenizer = reward_adapters(base, **changes), words(toy)
    reward = RewardModel(model, tokenizer) if kind == "single" else RewardEnsemble(model, tokenizer)
    reward.normalize([toy.prompts[0]] * len(toy.completions), toy.completions)
    reward.save_pretrained(folder)
    return folder


@pytest.fixture
def base(toy, tmp_path):
    return toy.save(tmp_path / "base")


def make(toy, tmp_path, model, reward_funcs, **changes):
    peft_config = changes.pop("peft_config", LORA)
    args = config(tmp_path / "out", **changes)
    return trainer(toy, args, model, reward_funcs, peft_config=peft_config)


def shared(made):
    (func,) = (func.__wrapped__ for func in made.reward_funcs if isinstance(func.__wrapped__, SharedReward))
    return func.reward


def own_weights(module):
    return {id(parameter) for parameter in module.parameters()}


@pytest.mark.parametrize("kind", ["single", "lora", "heads"])
def test_the_reward_is_that_of_a_model_of_its_own(toy, tmp_path, base, kind):
    folder = saved_reward(toy, base, tmp_path / "reward", kind)
    made = make(toy, tmp_path, base, folder, max_steps=3, learning_rate=1.0)
    own, reward = load_reward(folder), shared(made)
    assert own_weights(reward._members.classifier.model if kind != "single" else reward.model) & own_weights(
        made.model
    )
    prompts = [prompt for prompt in toy.prompts for _ in toy.completions]
    completions = toy.completions * len(toy.prompts)
    expected = own.member_rewards(prompts, completions)
    assert expected.std(dim=1).min() > 0.1
    for _ in ("before", "after"):  # the policy's own adapter learns in between
        assert_close(reward.member_rewards(prompts, completions), expected, rtol=1e-4, atol=1e-4)
        assert_close(torch.tensor(reward(prompts, completions)), expected.mean(0), rtol=1e-4, atol=1e-4)
        made.train()
    assert made.rollouts[0].rewards.std() > 0.01


def test_training_is_that_with_a_model_of_its_own(toy, tmp_path, base):
    folder = saved_reward(toy, base, tmp_path / "reward", "lora")
    trained = []
    for reward in (folder, load_reward(folder)):
        made = make(toy, tmp_path, base, [toy_reward, reward], max_steps=3, learning_rate=1.0, critic="separate")
        made.train()
        trained.append(made)
    one, other = (weights(made.model) for made in trained)
    names = [name.replace(".base_layer.", ".") for name in other]
    one = {name.replace(".base_layer.", "."): weight for name, weight in one.items()}
    # no draw of the adapters' moved the random state
    assert_close({name: one[name] for name in names}, dict(zip(names, other.values(), strict=True)))
    assert {name for name in one if name not in names} == {name for name in one if ".rlhf_bayes_reward1_" in name}


def test_gradient_checkpointing_changes_no_role(toy, tmp_path, base):
    folder = saved_reward(toy, base, tmp_path / "reward", "lora")
    trained = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # older releases of TRL do not seed before they make an adapter
        options = {"max_steps": 3, "learning_rate": 1.0, "critic": "separate", "gradient_checkpointing": checkpointing}
        made = make(toy, tmp_path, base, folder, **options)
        made.train()
        trained.append(made)
    assert [made.model.is_gradient_checkpointing for made in trained] == [False, True]
    for plain, ours in zip(*(made.rollouts for made in trained), strict=True):
        for name in ("rewards", "ref_token_log_probs", "token_log_probs", "values"):
            assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
    moved = (plain.token_log_probs - plain.ref_token_log_probs).abs().max()
    assert moved > 1e-2  # the reference is not the policy
    assert_close(*(weights(made.model) for made in trained[::-1]), rtol=1e-4, atol=1e-5)


def test_there_is_one_base(toy, tmp_path, base):
    made = make(toy, tmp_path, base, saved_reward(toy, base, tmp_path / "reward", "lora"), critic="shared")
    classifier = shared(made)._members.classifier.model
    heads = own_weights(classifier) - own_weights(made.model)
    assert len(heads) == 4  # the members', and the one that PEFT copied
    assert all(p.numel() == 32 for p in classifier.parameters() if id(p) in heads)
    frozen = [
        name for name, p in made.model.named_parameters() if ".rlhf_bayes_reward0_" in name and not p.requires_grad
    ]
    assert (
        len(frozen) == len([name for name, _ in made.model.named_parameters() if ".rlhf_bayes_reward0_" in name]) > 0
    )
    learns = [name for name, p in made.model.named_parameters() if p.requires_grad]
    assert all(".default." in name or ".critic." in name for name in learns)
    assert any(".default." in name for name in learns)
    assert any(".critic." in name for name in learns)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_checkpoints_hold_the_policy_alone_and_resume(toy, tmp_path, base, critic):
    folder = saved_reward(toy, base, tmp_path / "reward", "lora")
    options = {"critic": critic, "learning_rate": 1.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    made = make(toy, tmp_path, base, folder, **options)
    made.train()
    resumed = make(toy, tmp_path, base, folder, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_close(weights(resumed.model), weights(made.model))
    assert resumed.state.log_history[-2]["reward"] == made.state.log_history[-2]["reward"]

    made.save_model(str(tmp_path / "saved"))
    assert not [path.name for path in (tmp_path / "saved").rglob("*") if "reward" in path.name]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved")
    with torch.no_grad():
        assert_close(toy.log_probs(loaded), toy.log_probs(made.model))
        merged = made.model.merge_and_unload()
        assert_close(toy.log_probs(merged), toy.log_probs(loaded), rtol=1e-4, atol=1e-4)


def test_gdc_shares_too(toy, tmp_path, base):
    folder = saved_reward(toy, base, tmp_path / "reward")
    arguments = {"max_completion_length": 3, "num_generations": 8, "per_device_train_batch_size": 24, "max_steps": 2}
    made = GDCTrainer(
        base,
        folder,
        GDCConfig(str(tmp_path / "out"), proposal="adaptive", **arguments, **QUIET),
        train_dataset=prompts_of(toy),
        processing_class=toy.tokenizer,
        peft_config=LORA,
    )
    assert shared(made).model.config.num_labels == 1
    made.train()


def test_an_instance_with_the_weights_on_disk_shares(toy, tmp_path, base):
    folder = saved_reward(toy, base, tmp_path / "reward")
    model = AutoModelForCausalLM.from_pretrained(base)
    made = make(toy, tmp_path, model, folder)
    assert own_weights(model.model) < own_weights(shared(made).model)
    again = make(
        toy, tmp_path, get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA), folder, peft_config=None
    )
    assert own_weights(again.model.get_base_model().model) <= own_weights(shared(again).model)


def test_an_instance_changed_in_memory_does_not(toy, tmp_path, base, caplog):
    folder = saved_reward(toy, base, tmp_path / "reward")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    with caplog.at_level(logging.WARNING):
        made = make(toy, tmp_path, model, folder)
    assert "gets a base of its own: the policy's base has other weights" in caplog.text
    assert not own_weights(made.model) & own_weights(shared(made).model)
    prompts, completions = toy.prompts, toy.completions[:3]
    assert_close(shared(made)(prompts, completions), load_reward(folder)(prompts, completions))


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_a_policy_that_changes_its_base_does_not(toy, tmp_path, base, changes):
    folder = saved_reward(toy, base, tmp_path / "reward")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes)
    made = make(toy, tmp_path, base, folder, peft_config=lora)
    reward = made.reward_funcs[0].__wrapped__
    reward = reward.reward if isinstance(reward, SharedReward) else reward
    assert not own_weights(made.model) & own_weights(reward.model)
    prompts, completions = toy.prompts, toy.completions[:3]
    assert_close(reward(prompts, completions), load_reward(folder)(prompts, completions))


def test_a_whole_module_of_the_policy_is_none_of_the_reward(toy, tmp_path, base):
    # of the embeddings that the policy learns, the reward must read the base's
    folder = saved_reward(toy, base, tmp_path / "reward", "lora")
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    made = make(toy, tmp_path, base, folder, peft_config=lora, max_steps=2, learning_rate=1.0)
    made.train()
    prompts, completions = toy.prompts, toy.completions[:3]
    expected = load_reward(folder).member_rewards(prompts, completions)
    assert_close(shared(made).member_rewards(prompts, completions), expected, rtol=1e-4, atol=1e-4)


OTHERS = {
    "another base": lambda base, other: reward_adapters(other),
    "a bias": lambda base, other: reward_adapters(base, bias="lora_only"),
    "a base rewritten": lambda base, other: reward_adapters(base, init_lora_weights="pissa"),
    "another module": lambda base, other: reward_adapters(base, modules_to_save=["embed_tokens"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_an_adapter_alone_keeps_its_base(toy, tmp_path, base, case):
    model = OTHERS[case](base, toy.save(tmp_path / "other"))
    RewardModel(model, words(toy)).save_pretrained(tmp_path / "reward")
    made = make(toy, tmp_path, base, tmp_path / "reward")
    assert isinstance(made.reward_funcs[0].__wrapped__, RewardModel)


def test_a_policy_without_lora_shares_nothing(toy, tmp_path, base):
    folder = saved_reward(toy, base, tmp_path / "reward")
    made = make(toy, tmp_path, base, folder, peft_config=None)
    assert isinstance(made.reward_funcs[0].__wrapped__, RewardModel)


def test_an_adapter_that_is_missing_is_refused_before_the_model(toy, tmp_path, base):
    folder = saved_reward(toy, base, tmp_path / "reward", "lora")
    RewardIndex("lora", ["default", "member_1", "member_2", "member_3"]).save(folder)
    with pytest.raises(ValueError, match="must hold the adapter 'member_3'"):
        make(toy, tmp_path, base, folder)
