"""The prior is the model as passed, whatever the adapter does to its base, or the run is refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf_bayes import LanguageModel
from rlhf_bayes.lm.critic import active_adapter
from rlhf_bayes.testing import EnumerableLM

from ..training import config, gdc_config, logged, prompts_of, trainer
from .test_reference import assert_scored_under, log_probs, spread_adapter, train

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
REWRITING = ("pissa", "olora")


def lora(**changes):
    return LoraConfig(**{"r": 2, **TARGETS, **changes})


@pytest.fixture(scope="module")
def biased() -> EnumerableLM:
    """A toy whose attention has biases."""
    return EnumerableLM("qwen2", vocab_size=4, max_completion_length=3)


@pytest.mark.parametrize("by_path", [True, False])
@pytest.mark.parametrize("init", REWRITING)
def test_an_initialisation_that_rewrites_the_base_leaves_the_prior(toy, tmp_path, init, by_path):
    model = toy.save(tmp_path / "model") if by_path else toy.random_policy(noise=0.0)
    trained = train(
        toy, tmp_path, model, steps=2, peft_config=lora(init_lora_weights=init), eval_dataset=prompts_of(toy)
    )
    assert_scored_under(toy, trained, toy.log_prior, toy.log_prior)
    assert logged(trained, "posterior/kl_to_prior")[0] == pytest.approx(0, abs=1e-3)
    # the test can tell: without its adapter the policy is another model
    with trained.model.disable_adapter():
        assert (log_probs(toy, trained.model) - toy.log_prior).abs().max() > 0.1
    policy = log_probs(toy, trained.model)
    assert (policy - toy.log_prior).abs().max() > 1e-3
    trained.evaluate()
    assert_scored_under(toy, trained, policy, toy.log_prior, which=-1)


@pytest.mark.parametrize("init", REWRITING)
def test_a_critics_adapter_does_not_rewrite_the_base_again(toy, tmp_path, init):
    arguments = {"peft_config": lora(init_lora_weights=init)}
    trained = trainer(toy, config(tmp_path, critic="separate"), **arguments)
    assert_close(log_probs(toy, trained.model), toy.log_prior, rtol=1e-4, atol=1e-4)
    # the critic's trunk starts as the base that it sits on
    with trained.model.disable_adapter():
        base = log_probs(toy, trained.model)
    with active_adapter(trained.model.get_base_model(), "critic"):
        assert_close(log_probs(toy, trained.model), base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_ready_made_adapter_is_not_moved_by_building_the_trainer(biased, tmp_path, changes, critic):
    model = spread_adapter(get_peft_model(biased.random_policy(noise=0.0), lora(**changes)))
    passed = log_probs(biased, model)
    assert (passed - biased.log_prior).abs().max() > 0.1
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = trainer(biased, config(tmp_path, critic=critic), model, eval_dataset=prompts_of(biased))
    assert_close(log_probs(biased, trained.model), passed, rtol=1e-4, atol=1e-4)
    assert trains <= {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}
    move(trained.model)
    policy = log_probs(biased, trained.model)
    assert (policy - passed).abs().max() > 0.1
    draw(trained)
    assert_scored_under(biased, trained, policy, passed)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("of", [config, gdc_config])
def test_biases_that_learn_do_not_take_the_prior_along(biased, tmp_path, bias, of):
    trained = trainer(biased, of(tmp_path), peft_config=lora(bias=bias), eval_dataset=prompts_of(biased))
    move(trained.model)
    policy = log_probs(biased, trained.model)
    # the test can tell: without its adapter the policy has moved too
    with trained.model.disable_adapter():
        assert (log_probs(biased, trained.model) - biased.log_prior).abs().max() > 0.01
    draw(trained)
    assert_scored_under(biased, trained, policy, biased.log_prior)


def test_a_random_start_with_biases_keeps_its_base(biased, tmp_path):
    # neither the policy as built nor, once it learns, the policy without its adapter is the prior
    model = biased.random_policy(noise=0.0)
    arguments = {"peft_config": lora(init_lora_weights=False, bias="all"), "eval_dataset": prompts_of(biased)}
    trained = trainer(biased, config(tmp_path), model, **arguments)
    move(trained.model)
    policy = log_probs(biased, trained.model)
    draw(trained)
    assert_scored_under(biased, trained, policy, biased.log_prior)


def test_a_plain_adapter_needs_no_copy(biased, tmp_path):
    for changes in ({}, {"init_lora_weights": False}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        trained = trainer(biased, config(tmp_path), peft_config=lora(**changes))
        assert trained.ref_model is None


@pytest.mark.parametrize("of", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.parametrize("ready_made", [True, False])
def test_prompts_of_virtual_tokens_are_trained_and_scored_right(toy, tmp_path, of, ready_made):
    peft_config = of(num_virtual_tokens=2, task_type="CAUSAL_LM")
    if ready_made:
        model = get_peft_model(toy.random_policy(noise=0.0), peft_config)
        move(model)
        prior = table_of(toy, model)
        trained = train(toy, tmp_path, model, steps=2, eval_dataset=prompts_of(toy))
    else:
        prior = toy.log_prior
        trained = train(toy, tmp_path, None, steps=2, eval_dataset=prompts_of(toy), peft_config=peft_config)
    move(trained.model, scale=0.1)
    policy = table_of(toy, trained.model)
    assert (policy - prior).abs().max() > 1e-2
    trained.evaluate()
    assert_scored_under(toy, trained, policy, prior, which=-1)


def test_a_model_without_another_prior_is_refused(toy, tmp_path):
    model = toy.random_policy(noise=0.0)
    arguments = {"peft_config": lora(init_lora_weights=False)}
    original = PeftModel.__init__

    def rewriting(self, base, *args, **kwargs):
        with torch.no_grad():
            base.lm_head.weight.mul_(1.5)
        original(self, base, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "__init__", rewriting)
        with pytest.raises(ValueError, match="`ref_model` must be given with LlamaForCausalLM with a LORA adapter"):
            trainer(toy, config(tmp_path), model, **arguments)
        # and from a path, the prior is read once more
        trained = train(toy, tmp_path, toy.save(tmp_path / "model"), **arguments)
    assert_close(log_probs(toy, trained.ref_model), toy.log_prior)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
def test_an_initialisation_that_a_reload_cannot_repeat_is_refused(toy, tmp_path, init):
    with pytest.raises(ValueError, match=f"`init_lora_weights` must be .* got '{init}' for the policy"):
        trainer(toy, config(tmp_path), "nowhere", peft_config=lora(init_lora_weights=init))
    model = get_peft_model(toy.random_policy(noise=0.0), lora())
    model.save_pretrained(tmp_path / "adapter")
    model.peft_config["default"].init_lora_weights = init
    model.peft_config["default"].save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="initialisation that PEFT repeats when it reads a saved adapter"):
        LanguageModel(tmp_path / "adapter", toy.tokenizer)


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_a_run_that_goes_on_has_the_prior_that_it_started_from(biased, tmp_path, changes):
    model, arguments = biased.save(tmp_path / "model"), {"peft_config": lora(**changes)}
    args = config(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1.0)
    first = trainer(biased, args, model, **arguments)
    first.train()
    first.save_model()
    policy = log_probs(biased, first.model)
    # the folder is the policy, for PEFT and for LanguageModel
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), args.output_dir)
    assert_close(log_probs(biased, reloaded), policy, rtol=1e-4, atol=1e-4)
    from_folder = LanguageModel(args.output_dir, biased.tokenizer, max_completion_length=3)
    assert_close(log_probs(biased, from_folder.model), policy, rtol=1e-4, atol=1e-4)
    again = trainer(biased, args, model, eval_dataset=prompts_of(biased), **arguments)
    again.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-1")
    assert_close(log_probs(biased, again.model), policy, rtol=1e-3, atol=1e-3)
    policy = log_probs(biased, again.model)
    draw(again)
    assert_scored_under(biased, again, policy, biased.log_prior)


def move(model, scale=0.3):
    """Move what a policy trains."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".critic." not in f".{name}":
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def draw(trained):
    """A rollout in evaluation, with what it drew."""
    reward, drawn = trained.reward_funcs[0], []

    def recording(prompts, completion_ids, **kwargs):
        drawn.append((list(prompts), list(completion_ids)))
        return reward(prompts=prompts, completion_ids=completion_ids, **kwargs)

    recording.__name__ = reward.__name__
    trained.reward_funcs[0], trained.drawn, trained.rollouts = recording, drawn, []
    trained.evaluate()


@torch.no_grad()
def table_of(toy, model):
    """log π of every prompt and completion (P, N) by plain PEFT, each alone."""
    rows = []
    for prompt in toy.prompts:
        ids = toy.tokenizer(prompt)["input_ids"]
        row = []
        for completion in toy.completion_ids:
            logits = model(input_ids=torch.tensor([ids + completion])).logits[0, -len(completion) - 1 : -1]
            row.append(logits.log_softmax(-1)[range(len(completion)), completion].sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)
