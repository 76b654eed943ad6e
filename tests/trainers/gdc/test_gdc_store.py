"""GDCTrainer from a store: exact where the store is, for any posterior, and nothing but the policy is run."""

import dataclasses
import math

import pytest
import torch
from peft import LoraConfig

from rlhf_bayes import RewardLikelihood
from rlhf_bayes.likelihoods import Constraint, MomentLikelihood, ProductLikelihood
from rlhf_bayes.lm import forward
from rlhf_bayes.numerics import f_divergence
from rlhf_bayes.store import CompletionStore, StoredColumn
from rlhf_bayes.store.stored_draws import StoredDraws
from rlhf_bayes.testing import EnumerableLM, toy_reward

from ...store.stored import all_once, completion, drawn, provenance, starts_with_a
from ..rollout.test_rollout_checkpoint import assert_same_run
from ..training import Recorder, gdc_config, prompts_of, trainer

ONE_BATCH = {"per_device_train_batch_size": 120, "num_generations": 40}
CONDITION = "starts_with_a"

# posterior -> (changes of the configuration, likelihood)
POSTERIORS = {
    "beta 0.5": ({"beta": 0.5}, None),
    "beta 2, clipped": ({"beta": 2.0, "reward_clip_range": (-0.5, 1.0), "reward_weights": [2.0]}, None),
    "condition": ({"beta": None}, Constraint(StoredColumn(CONDITION))),
}


def evidence(toy, name):
    """(P, N), nats, without the package."""
    if name == "condition":
        allowed = torch.tensor([ids[0] == 0 for ids in toy.completion_ids])
        return torch.where(allowed, 0.0, -torch.inf).expand_as(toy.rewards)
    return toy.rewards / 0.5 if name == "beta 0.5" else (2.0 * toy.rewards).clamp(-0.5, 1.0) / 2.0


def from_store(toy, store, folder, posterior, model=None, **changes):
    options, likelihood = POSTERIORS[posterior]
    arguments = {} if likelihood is None else {"likelihood": likelihood}
    callbacks = changes.pop("callbacks", [])
    args = gdc_config(folder, **ONE_BATCH | options | changes)
    return trainer(toy, args, model, None, train_dataset=store, callbacks=callbacks, **arguments)


@pytest.fixture(scope="module")
def store(toy, tmp_path_factory):
    return all_once(toy, tmp_path_factory.mktemp("store") / "store")


def flat_gradient(policy, value):
    gradients = torch.autograd.grad(value, list(policy.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def divergence_of(toy, policy, log_likelihood, divergence):
    """Mean over prompts, with gradient."""
    if divergence == "log_variance":
        difference = toy.log_probs(policy) - toy.log_prior - log_likelihood
        return 0.5 * difference.var(-1).mean()  # all completions alike, as the uniform distribution drew them
    log_target = (toy.log_prior + log_likelihood).log_softmax(-1)
    return f_divergence(log_target, toy.log_probs(policy), divergence).mean()


@pytest.mark.parametrize(
    ("posterior", "divergence"),
    [*((name, "forward_kl") for name in POSTERIORS), *((name, "log_variance") for name in list(POSTERIORS)[:2]),
     ("condition", "js"), ("beta 0.5", "reverse_kl")],
)  # fmt: skip
def test_log_z_and_gradient_of_each_posterior_are_exact_from_one_store(toy, store, tmp_path, posterior, divergence):
    policy, recorder = toy.random_policy(noise=0.05, seed=2), Recorder()
    baseline = {} if divergence == "log_variance" else {"baseline": "constant"}
    # the policy is not the prior, which is then named
    trained = from_store_of(toy, store, tmp_path, posterior, policy, recorder, divergence=divergence, **baseline)
    log_likelihood = evidence(toy, posterior)
    expected = flat_gradient(policy, divergence_of(toy, policy, log_likelihood, divergence))
    trained.train()
    found = torch.cat([recorder.gradients[0][name].flatten() for name, _ in trained.model.named_parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 + 1e-5 * expected.abs().max().item())
    (log_z,) = [entry["posterior/log_z"] for entry in trained.state.log_history if "posterior/log_z" in entry]
    assert log_z == pytest.approx(toy.log_z(log_likelihood).mean().item(), abs=1e-5)
    if posterior != "condition" and divergence == "forward_kl":
        assert logged_value(trained, "posterior/elbo") == pytest.approx(
            toy.elbo(policy, log_likelihood).mean().item(), abs=1e-4
        )


def from_store_of(toy, store, folder, posterior, policy, recorder, **changes):
    options, likelihood = POSTERIORS[posterior]
    arguments = {} if likelihood is None else {"likelihood": likelihood}
    args = gdc_config(folder, **ONE_BATCH | {"learning_rate": 0.0} | options | changes)
    prior = toy.random_policy(noise=0.0)
    return trainer(toy, args, policy, None, train_dataset=store, ref_model=prior, callbacks=[recorder], **arguments)


def logged_value(trained, name):
    (value,) = [entry[name] for entry in trained.state.log_history if name in entry]
    return value


@pytest.mark.slow
def test_each_posterior_is_reached_from_one_store(toy, tmp_path):
    """Without the prompt "a": a Llama cannot tell "a" from "a a", so no training reaches its posterior."""
    store = all_once(toy, tmp_path / "store", prompts=(1, 2))
    schedule = {"optim": "adamw_torch", "learning_rate": 5e-3, "lr_scheduler_type": "linear", "max_steps": 110}
    sizes = {"per_device_train_batch_size": 80, "baseline": "constant", "logging_strategy": "no"}
    for posterior in POSTERIORS:
        policy, log_likelihood = toy.random_policy(noise=0.0), evidence(toy, posterior)
        before = toy.forward_kl(policy, log_likelihood)[1:].mean().item()
        from_store(toy, store, tmp_path, posterior, policy, **sizes, **schedule).train()
        after = toy.forward_kl(policy, log_likelihood)[1:].mean().item()
        assert after < min(0.012, before / 4), posterior


@pytest.mark.slow
def test_log_variance_reaches_the_posterior_from_draws_of_the_prior(toy, tmp_path):
    """Draws, not an enumeration: 1,600 of the prior, each read three times."""
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    store.append(drawn(toy, toy.log_prior, 800, "prior")[800:])
    policy = toy.random_policy(noise=0.0)
    changes = {"divergence": "log_variance", "per_device_train_batch_size": 48, "num_generations": 24}
    changes |= {"optim": "adamw_torch", "learning_rate": 5e-3, "lr_scheduler_type": "linear", "logging_strategy": "no"}
    before = toy.reverse_kl(policy)[1:].mean().item()
    from_store(toy, store, tmp_path, "beta 0.5", policy, max_steps=-1, num_train_epochs=3, **changes).train()
    assert toy.reverse_kl(policy)[1:].mean().item() < 0.02 < before / 10


def test_nothing_but_the_policy_is_run(toy, store, tmp_path, monkeypatch):
    """One forward of the policy a step: no generation, no prior, no reward."""
    calls = []
    score = forward._score_batch

    def counted(model, *arguments, **options):
        calls.append(model)
        return score(model, *arguments, **options)

    trained = from_store(toy, store, tmp_path, "beta 0.5", max_steps=3)
    monkeypatch.setattr(forward, "_score_batch", counted)
    monkeypatch.setattr(type(trained.model), "generate", None)
    trained.train()
    assert [model is trained.model for model in calls] == [True] * 3
    assert trained.reference.module is None
    assert trained.ref_model is None


def test_an_epoch_reads_each_completion_once_in_groups_that_change(toy, tmp_path):
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    store.append(drawn(toy, toy.log_prior, 16, "prior"))
    store.append([completion(toy, 0, 0, -1.0, "prior")])  # a 17th, which no group of 4 takes in every epoch
    changes = {"per_device_train_batch_size": 12, "num_generations": 4, "max_steps": -1, "num_train_epochs": 2}
    trained = from_store(toy, store, tmp_path, "beta 0.5", **changes)
    read, rows = [], trained.stored._rows

    def recorded(*arguments):
        read.append(rows(*arguments))
        return read[-1]

    trained.stored._rows = recorded
    trained.train()
    assert len(read) == 8
    epochs = [torch.cat(read[:4]), torch.cat(read[4:])]
    groups = []
    for epoch in epochs:
        assert len(epoch.unique()) == 48
        of = epoch.view(-1, 4)
        assert (trained.stored.draws.prompt_index[of] == trained.stored.draws.prompt_index[of[:, :1]]).all()
        groups.append({frozenset(group.tolist()) for group in of})
    assert groups[0] != groups[1]


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kl", "log_variance"])
def test_a_resumed_run_is_bitwise_that_of_an_uninterrupted_one(toy, tmp_path, divergence):
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    store.append(drawn(toy, toy.log_prior, 24, "prior"))

    def make(folder):
        changes = {"per_device_train_batch_size": 12, "steps_per_generation": 2, "num_generations": 4}
        changes |= {"max_steps": 9, "save_strategy": "steps", "save_steps": 5, "optim": "adamw_torch"}
        changes |= {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "beta_init": 3.0}
        return from_store(toy, store, folder, "beta 0.5", divergence=divergence, **changes)

    whole, resumed = make(tmp_path / "whole"), make(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same_run(resumed, whole)
    store.append(drawn(toy, toy.log_prior, 4, "prior", seed=1))
    with pytest.raises(ValueError, match="must hold the 72 completions of the run that is resumed, got 84"):
        make(tmp_path / "more").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))


@pytest.mark.slow
def test_micro_batches_and_an_adapter_have_the_gradient_of_one_batch(toy, store, tmp_path):
    """With LoRA the prior is the base, with the hash of the plain model. Micro-batches sum to the same gradient."""
    found = []
    for sizes in ({}, {"per_device_train_batch_size": 60, "gradient_accumulation_steps": 2}):
        torch.manual_seed(0)
        policy, recorder = toy.random_policy(noise=0.0), Recorder()
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"])
        args = gdc_config(tmp_path, **ONE_BATCH | {"beta": 0.5, "divergence": "log_variance"} | sizes)
        trained = trainer(toy, args, policy, None, train_dataset=store, peft_config=adapter, callbacks=[recorder])
        trained.train()
        found.append(torch.cat([gradient.flatten() for gradient in recorder.gradients[0].values()]))
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_any_evidence_of_stored_columns_and_of_the_texts(toy, store):
    """A product of a reward, a condition on the text, and a moment: each against its own formula."""
    draws = StoredDraws.of(store)
    product = ProductLikelihood(
        [
            RewardLikelihood(StoredColumn("toy_reward"), beta=0.3),
            Constraint(starts_with_a),
            MomentLikelihood({"length": lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids]},
                             {"length": 0.7}),
        ]
    )  # fmt: skip
    found, features = draws.evidence(product)
    lengths = torch.tensor([float(len(ids)) for ids in toy.completion_ids])
    expected = toy.rewards / 0.3 + 0.7 * lengths + evidence(toy, "condition")
    torch.testing.assert_close(found.view(3, -1), expected, rtol=1e-5, atol=1e-5)
    assert features["length"].tolist() == lengths.repeat(3).tolist()
    with pytest.raises(ValueError, match="must name a reward or a feature of the store, got 'polite'"):
        draws.evidence(RewardLikelihood(StoredColumn("polite"), beta=1.0))


class TestRefusals:
    def test_another_prior(self, toy, store, tmp_path):
        with pytest.raises(ValueError, match=r"made with the same `prior`, 'float32-[0-9a-f]{16}', got .*'float32-"):
            from_store(toy, store, tmp_path, "beta 0.5", toy.random_policy(noise=1e-4))

    def test_half_precision_is_another_prior(self, toy, store, tmp_path):
        with pytest.raises(ValueError, match="`prior`, 'bfloat16-"):
            from_store(toy, store, tmp_path, "beta 0.5", toy.random_policy(noise=0.0).bfloat16())

    def test_another_tokenizer(self, toy, store, tmp_path):
        other = EnumerableLM(vocab_size=5, max_completion_length=3)
        args = gdc_config(tmp_path, **ONE_BATCH)
        with pytest.raises(ValueError, match="`tokenizer`"):
            trainer(toy, args, None, None, train_dataset=store, processing_class=other.tokenizer)

    def test_another_reward(self, toy, store, tmp_path):
        def kind(completions, **kwargs):
            return [0.0] * len(completions)

        args = gdc_config(tmp_path, **ONE_BATCH)
        trainer(toy, args, None, toy_reward, train_dataset=store)
        with pytest.raises(ValueError, match=r"`rewards`, kind \(.*got .*toy_reward \("):
            trainer(toy, args, None, kind, train_dataset=store)

    def test_another_reward_of_the_same_name(self, toy, store, tmp_path):
        def another(completions, **kwargs):
            return [0.0] * len(completions)

        another.__name__ = "toy_reward"
        with pytest.raises(ValueError, match="`rewards`"):
            trainer(toy, gdc_config(tmp_path, **ONE_BATCH), None, another, train_dataset=store)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("temperature", 0.7), ("max_completion_length", 4), ("proposal", "prior"), ("prior_samples", 40),
         ("replay_batches", 2), ("prior_probe", 8), ("store", "elsewhere"), ("log_completions", True),
         ("num_generations", 60)],
    )  # fmt: skip
    def test_settings(self, toy, store, tmp_path, name, value):
        args = gdc_config(tmp_path, **ONE_BATCH | {"beta": 0.5, name: value})
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            trainer(toy, args, None, None, train_dataset=store)

    def test_evaluation(self, toy, store, tmp_path):
        args = gdc_config(tmp_path, **ONE_BATCH)
        with pytest.raises(ValueError, match="`eval_dataset` must be left out"):
            trainer(toy, args, None, None, train_dataset=store, eval_dataset=prompts_of(toy))

    def test_ppo(self, toy, store, tmp_path):
        from ..training import config

        with pytest.raises(TypeError, match="got a CompletionStore"):
            trainer(toy, config(tmp_path), train_dataset=store)

    def test_no_rewards(self, toy, tmp_path):
        made = dataclasses.replace(provenance(toy), rewards={})
        store = CompletionStore.create(tmp_path / "store", made)
        with pytest.raises(ValueError, match="must hold completions, got none"):
            from_store(toy, store, tmp_path, "beta 0.5")
        store.append(completion(toy, 0, index, -math.log(40), "uniform", rewards={}) for index in range(40))
        with pytest.raises(ValueError, match="must hold rewards, got none"):
            from_store(toy, store, tmp_path, "beta 0.5")
