"""Which distribution is the prior, for every way of passing it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

from rlhf_bayes.testing import EnumerableLM
from rlhf_bayes.trainers.rollout.reference import Reference

from ..training import config, largest_change, prompts_of, trainer, weights

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def spread_adapter(model, name="default", seed=0):
    """Move a LoRA adapter away from its zero start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.normal_(std=0.3, generator=generator)
    return model


def assert_scored_under(toy, trained, policy_log_probs, prior_log_probs, which=0):
    """A rollout's log-ratios are those of enumeration: log π − log π0 by prompt and completion, nats."""
    table = policy_log_probs - prior_log_probs  # (P, N)
    rollout, (prompts, ids) = trained.rollouts[which], trained.drawn[which]
    column = {tuple(completion): index for index, completion in enumerate(toy.completion_ids)}
    expected = [table[toy.prompts.index(p), column[tuple(i)]] for p, i in zip(prompts, ids, strict=True)]
    actual = (rollout.token_log_probs - rollout.ref_token_log_probs).sum(-1)
    assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-4)


def train(toy, tmp_path, model, steps=1, **arguments):
    drawn = []

    def reward(prompts, completion_ids, **kwargs):
        drawn.append((list(prompts), list(completion_ids)))
        return [float(len(set(ids))) for ids in completion_ids]

    changes = {"max_steps": steps, "learning_rate": 1.0}
    trained = trainer(toy, config(tmp_path, **changes), model, reward, **arguments)
    trained.train()
    trained.drawn = drawn
    return trained


@torch.no_grad()
def log_probs(toy, model):
    return toy.log_probs(model)


def test_an_instance_changed_in_memory_is_the_prior(toy, tmp_path):
    # where the weights once came from must not matter
    folder = toy.save(tmp_path / "model")
    model = toy.random_policy(noise=0.1, seed=3)
    model.config._name_or_path = folder
    prior = log_probs(toy, model)
    assert (prior - toy.log_prior).abs().max() > 0.1
    trained = train(toy, tmp_path, model, steps=3)
    assert_scored_under(toy, trained, prior, prior)
    after = log_probs(toy, trained.model)
    assert (after - prior).abs().max() > 1e-3  # the policy moved, and the prior did not move with it
    assert_close(log_probs(toy, trained.ref_model), prior)


def test_a_path_is_its_own_prior(toy, tmp_path):
    trained = train(toy, tmp_path, toy.save(tmp_path / "model"))
    assert_scored_under(toy, trained, toy.log_prior, toy.log_prior)


@pytest.mark.parametrize("by_path", [True, False])
def test_a_ref_model_of_its_own(toy, tmp_path, by_path):
    policy = toy.random_policy(noise=0.1, seed=3)
    before = log_probs(toy, policy)
    ref_model = toy.save(tmp_path / "prior") if by_path else toy.random_policy(noise=0.0)
    trained = train(toy, tmp_path, policy, ref_model=ref_model)
    assert_scored_under(toy, trained, before, toy.log_prior)


def test_the_reference_is_frozen(toy, tmp_path):
    ref_model = toy.random_policy(noise=0.1, seed=3).train()
    before = weights(ref_model)
    trained = train(toy, tmp_path, None, steps=3, ref_model=ref_model)
    assert not any(parameter.requires_grad for parameter in trained.ref_model.parameters())
    assert not trained.ref_model.training
    assert largest_change(before, weights(ref_model)) == 0
    own = {id(parameter) for parameter in trained.model.parameters()}
    assert not own & {id(parameter) for parameter in trained.ref_model.parameters()}
    in_optimizer = {id(p) for group in trained.optimizer.param_groups for p in group["params"]}
    assert not in_optimizer & {id(parameter) for parameter in trained.ref_model.parameters()}


def test_the_base_is_the_prior_of_a_new_adapter(toy, tmp_path):
    trained = train(toy, tmp_path, None, steps=3, peft_config=LORA)
    assert trained.ref_model is None
    assert_scored_under(toy, trained, toy.log_prior, toy.log_prior)
    assert (log_probs(toy, trained.model) - toy.log_prior).abs().max() > 1e-3
    with trained.model.disable_adapter():
        assert_close(log_probs(toy, trained.model), toy.log_prior)


def test_a_ready_made_adapter_starts_as_the_prior(toy, tmp_path):
    model = spread_adapter(get_peft_model(toy.random_policy(noise=0.0), LORA))
    prior = log_probs(toy, model)
    assert (prior - toy.log_prior).abs().max() > 0.1
    trained = train(toy, tmp_path, model, steps=3)
    assert_scored_under(toy, trained, prior, prior)
    assert (log_probs(toy, trained.model) - prior).abs().max() > 1e-3
    with trained.reference.active(trained.model) as ref_model:
        assert_close(log_probs(toy, ref_model), prior)
    # and the policy's adapter is active again, the only one that learns
    learns = {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}
    assert learns
    assert all(".default." in name or ".critic." in name for name in learns)


def test_an_adapter_may_have_another_prior_than_its_base(toy, tmp_path):
    ref_model = toy.random_policy(noise=0.1, seed=3)
    prior = log_probs(toy, ref_model)
    trained = train(toy, tmp_path, None, peft_config=LORA, ref_model=ref_model)
    assert_scored_under(toy, trained, toy.log_prior, prior)


@pytest.mark.parametrize("ready_made", [True, False])
def test_modules_trained_whole_beside_an_adapter_switch_with_it(toy, tmp_path, ready_made):
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], task_type="CAUSAL_LM"
    )
    if ready_made:
        model = spread_adapter(get_peft_model(toy.random_policy(noise=0.0), lora))
        prior = log_probs(toy, model)
        trained = train(toy, tmp_path, model, eval_dataset=prompts_of(toy))
    else:
        prior = toy.log_prior
        trained = train(toy, tmp_path, None, eval_dataset=prompts_of(toy), peft_config=lora)
        spread_adapter(trained.model)
    policy = log_probs(toy, trained.model)
    assert (policy - prior).abs().max() > 1e-3
    trained.evaluate()
    assert_scored_under(toy, trained, policy, prior, which=-1)


def test_the_policy_itself_is_refused(toy, tmp_path):
    model = toy.random_policy(noise=0.0)
    with pytest.raises(ValueError, match=r"`ref_model` must not be the `model` object itself: .* Leave `ref_model`"):
        trainer(toy, config(tmp_path), model, ref_model=model)
    with pytest.raises(ValueError, match="must not be the `model` object itself"):
        trainer(toy, config(tmp_path), model, ref_model=model, peft_config=LORA)


def test_another_vocabulary_is_refused(toy, tmp_path):
    other = EnumerableLM(vocab_size=5, max_completion_length=3)
    with pytest.raises(ValueError, match="`ref_model` must share the policy's vocabulary of 4 tokens, got 5"):
        trainer(toy, config(tmp_path), ref_model=other.model)
    with pytest.raises(ValueError, match="vocabulary of 4 tokens, got 5"):
        trainer(toy, config(tmp_path), ref_model=other.save(tmp_path / "other"))


def test_sharded_weights_cannot_be_copied(toy):
    model = toy.random_policy(noise=0.0)
    next(model.parameters()).ds_id = 0  # as DeepSpeed ZeRO-3 marks them
    with pytest.raises(ValueError, match="`ref_model` must be given under DeepSpeed ZeRO-3"):
        Reference.of(model, None, reload=None)


def test_the_copy_runs_its_own_weights(toy):
    model = toy.random_policy(noise=0.0)
    reference = Reference.of(model, None, reload=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(log_probs(toy, reference.module), toy.log_prior)


def test_a_saved_adapter_can_be_trained_on(toy, tmp_path):
    spread_adapter(get_peft_model(toy.random_policy(noise=0.0), LORA)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(toy.random_policy(noise=0.0), tmp_path / "adapter", is_trainable=True)
    prior = log_probs(toy, model)
    assert_scored_under(toy, train(toy, tmp_path, model), prior, prior)
