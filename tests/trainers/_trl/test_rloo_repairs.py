"""Prompts, names and metrics where RLOO's would say something wrong; policies that RLOO trains and that none could."""

import logging
import re

import pytest
import torch
from datasets import DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf_bayes import GDCConfig, GDCTrainer
from rlhf_bayes.rewards.scoring import distinct_names
from rlhf_bayes.testing import EnumerableLM, toy_reward

from ..training import config, largest_change, logged, prompts_of, trainer, weights

BOTH = pytest.mark.parametrize("kind", ["ppo", "gdc"])


def config_of(kind, folder, **changes):
    return config(folder, GDCConfig, **changes) if kind == "gdc" else config(folder, **changes)


def test_prompts_do_not_end_where_the_tokenizer_ends_texts(tmp_path):
    toy = EnumerableLM(vocab_size=4, max_completion_length=3)
    eos = (toy.tokenizer.eos_token, toy.tokenizer.eos_token_id)
    plain = [toy.tokenizer(prompt)["input_ids"] for prompt in toy.prompts]
    toy.tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])
    assert all(toy.tokenizer(prompt)["input_ids"][-1] == eos[1] for prompt in toy.prompts)
    run = trainer(toy, config(tmp_path))
    run.train()
    (rollout,) = run.rollouts
    batch = run.batches[0]
    assert rollout.token_log_probs.shape == batch["loss_mask"].shape
    prompts = []
    run.reward_funcs = [lambda prompts, **columns: [0.0] * len(prompts)]
    generate = run._generate_single_turn
    run._generate_single_turn = lambda ids, *rest: prompts.extend(ids) or generate(ids, *rest)
    run.evaluate(prompts_of(toy))
    assert {tuple(ids) for ids in prompts} == {tuple(ids) for ids in plain}


def test_equal_names_have_metrics_of_their_own(toy, tmp_path):
    def judges():
        def judge(prompts, completions, completion_ids, **columns):
            return [0.0] * len(completions)

        def other(prompts, completions, completion_ids, **columns):
            return [1.0] * len(completions)

        other.__name__ = "judge"
        return [judge, other]

    run = trainer(toy, config(tmp_path), reward_funcs=judges())
    run.train()
    assert logged(run, "rewards/judge/mean") == [0.0]
    assert logged(run, "rewards/judge_2/mean") == [1.0]
    assert distinct_names(["a", "a_2", "a", "a"]) == ["a", "a_2", "a_3", "a_4"]


@BOTH
def test_metrics_of_several_datasets_carry_their_names(kind, toy, tmp_path):
    first, second = toy.prompts[:1], toy.prompts[1:2]
    parts = DatasetDict(one=prompts_of(toy).select([0]), two=prompts_of(toy).select([1]))

    def position(prompts, **columns):
        return [float(prompt in second) - float(prompt in first) for prompt in prompts]

    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"metric_for_best_model": "eval_two_reward", "load_best_model_at_end": True, "max_steps": 2}
    args = config_of(kind, tmp_path, per_device_eval_batch_size=8, **steps, **best)
    run = trainer(toy, args, reward_funcs=position, eval_dataset=parts)
    run.train()
    assert logged(run, "eval_one_reward") == [-1.0, -1.0]
    assert logged(run, "eval_two_reward") == [1.0, 1.0]
    assert not [name for entry in run.state.log_history for name in entry if name == "eval_reward"]
    assert run.state.best_metric == 1.0
    assert "eval_reward" in run.evaluate(parts["one"])


@BOTH
def test_experts_are_trained_under_default_flags(kind, toy, tmp_path, caplog):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["qwen3_moe"](
            vocab_size=4, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1,
            eos_token_id=toy.tokenizer.eos_token_id, bos_token_id=None, pad_token_id=toy.tokenizer.pad_token_id,
        )
    )  # fmt: skip
    assert model.config.router_aux_loss_coef == 0.001
    before = weights(model)
    with caplog.at_level(logging.WARNING):
        run = trainer(toy, config_of(kind, tmp_path), model)
    assert "`router_aux_loss_coef` is 0.001 in the model's config and taken as 0" in caplog.text
    run.train()
    assert largest_change(before, weights(run.model)) > 0
    assert not logged(run, "aux_loss")
    config_of(kind, tmp_path, router_aux_loss_coef=None)
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef` must be 0 or None, got 0\.01"):
        config_of(kind, tmp_path, router_aux_loss_coef=0.01)


@BOTH
def test_a_step_over_several_rollouts_is_drawn_at_once(kind, toy, tmp_path, caplog):
    def trained(folder, **sizes):
        run = trainer(toy, config_of(kind, tmp_path / folder, **sizes))
        run.train()
        return run

    whole = trained("whole", per_device_train_batch_size=24)
    with caplog.at_level(logging.WARNING):
        parts = trained("parts", per_device_train_batch_size=4, gradient_accumulation_steps=6, steps_per_generation=2)
    assert "`steps_per_generation` is 2 and taken as 6" in caplog.text
    assert len(parts.rollouts) == 1
    for name, weight in weights(whole.model).items():
        assert_close(weights(parts.model)[name], weight, rtol=1e-4, atol=1e-6)


@BOTH
@pytest.mark.parametrize("given", [{"steps_per_generation": 6}, {"generation_batch_size": 48}])
def test_steps_that_do_not_fit_rollouts_are_refused_with_advice_that_works(kind, given, tmp_path):
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    with pytest.raises(ValueError, match=r"`gradient_accumulation_steps` \(4\) must divide .* \(6\) or be") as error:
        config_of(kind, tmp_path, **sizes | given)
    advice = re.findall(r"`(\w+)=(\d+)`", str(error.value))
    assert [name for name, _ in advice] == ["gradient_accumulation_steps", "steps_per_generation"]
    config_of(kind, tmp_path, **sizes | given | {advice[0][0]: int(advice[0][1])})
    config_of(kind, tmp_path, **sizes | {advice[1][0]: int(advice[1][1])})


@BOTH
def test_a_policy_without_trainable_weights_is_refused(kind, toy, tmp_path):
    adapted = get_peft_model(toy.random_policy(noise=0.0), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    policies = {
        "is_trainable=True": PeftModel.from_pretrained(toy.random_policy(noise=0.0), tmp_path / "adapter"),
        r"requires_grad_\(True\)": toy.random_policy(noise=0.0).requires_grad_(False),
    }
    for way_out, policy in policies.items():
        with pytest.raises(ValueError, match=f"`model` must have weights to train.*{way_out}"):
            trainer(toy, config_of(kind, tmp_path), policy)
    frozen = toy.random_policy(noise=0.0).requires_grad_(False)
    trainer(toy, config_of(kind, tmp_path), frozen, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


@BOTH
def test_an_adapter_of_another_name_is_refused_by_name(kind, toy, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = get_peft_model(toy.random_policy(noise=0.0), lora, adapter_name="mine")
    with pytest.raises(ValueError, match=r"named 'default', got a PeftModel with \['mine'\].*is_trainable=True"):
        trainer(toy, config_of(kind, tmp_path), policy)


def test_tokenised_prompts_are_not_renamed(toy, tmp_path):
    ids = prompts_of(toy).map(lambda row: toy.tokenizer(row["prompt"]), remove_columns="prompt")
    with pytest.raises(ValueError, match=r"tokenises itself: `dataset\.map\(.*tokenizer\.decode\(row\['input_ids'\]"):
        GDCTrainer(toy.model, toy_reward, config_of("gdc", tmp_path), ids, processing_class=toy.tokenizer)
    advised = ids.map(lambda row: {"prompt": toy.tokenizer.decode(row["input_ids"])})
    assert advised["prompt"] == toy.prompts
