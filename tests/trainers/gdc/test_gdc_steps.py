"""Steps that are skipped, clipped, annealed, or prepared by draws from the prior."""

import math

import pytest
import torch
from transformers import TrainerCallback

from rlhf_bayes.likelihoods import Constraint
from rlhf_bayes.testing import toy_reward

from ..training import gdc_config, keep_log_z, largest_change, logged, prompts_of, trainer, weights


class Weights(TrainerCallback):
    """Of the policy after each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append(weights(model))


class SkipsFrom(TrainerCallback):
    """Asks for more effective completions than there can be, from a step on."""

    def __init__(self, step, objective):
        self.step, self.objective = step, objective

    def on_step_begin(self, args, state, control, **kwargs):
        self.objective.ess_min = 1e9 if state.global_step >= self.step else 0.0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_skipped_step_does_not_move_the_weights_at_all(toy, tmp_path, accumulation):
    """Neither by the momentum of the steps before it, nor by weight decay."""
    recorder = Weights()
    changes = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-2, "max_steps": 5}
    sizes = {"per_device_train_batch_size": 24 // accumulation, "gradient_accumulation_steps": accumulation}
    args = gdc_config(tmp_path, **changes, **sizes)
    trained = trainer(toy, args, callbacks=[recorder])
    trained.add_callback(SkipsFrom(3, trained.objective))
    trained.train()
    moved = [largest_change(before, after) for before, after in zip(recorder.steps, recorder.steps[1:], strict=False)]
    assert min(moved[:2]) > 1e-4
    assert moved[2:] == [0.0, 0.0]
    assert logged(trained, "gdc/skipped_steps") == [0.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("ess_min", [0.0, 3.0])
def test_steps_are_judged_by_the_ess_of_their_weights(toy, tmp_path, ess_min):
    policy = toy.random_policy(noise=0.05, seed=3)
    args = gdc_config(tmp_path, ess_min=ess_min, max_steps=6, learning_rate=0.01, proposal="prior")
    trained = trainer(toy, args, policy, ref_model=toy.random_policy(0.0))
    keep_log_z(trained, toy.log_z())
    trained.train()
    for ess, skipped, batch in zip(
        logged(trained, "gdc/step_ess"), logged(trained, "gdc/skipped_steps"), trained.batches, strict=True
    ):
        w = (batch["log_prior"] + batch["log_likelihood"] - batch["log_z"] - batch["log_proposal"]).exp()
        assert ess == pytest.approx((w.sum() ** 2 / w.square().sum()).item(), rel=1e-4)
        assert skipped == (ess < ess_min)


def test_a_step_without_any_weight_is_skipped(toy, tmp_path):
    trained = trainer(toy, gdc_config(tmp_path, ess_min=0.5), None, lambda prompts, **kwargs: [-math.inf] * 24)
    before = weights(trained.model)
    trained.train()
    assert largest_change(before, weights(trained.model)) == 0
    assert (logged(trained, "gdc/step_ess"), logged(trained, "gdc/skipped_steps")) == ([0.0], [1.0])


def test_clipped_pseudo_rewards_are_reported(toy, tmp_path, caplog):
    policy = toy.random_policy(noise=0.05, seed=2)
    args = gdc_config(tmp_path, max_pseudo_reward=1.5, learning_rate=0.0, logging_steps=1)
    trained = trainer(toy, args, policy, ref_model=toy.random_policy(0.0))
    keep_log_z(trained, toy.log_z())
    trained.train()
    batch = trained.batches[0]
    reward = (batch["log_prior"] + batch["log_likelihood"] - batch["log_z"] - batch["log_policy"]).exp()  # p/π
    assert (reward > 1.5).any()
    lost, kept = (reward - 1.5).clamp(min=0).sum(), (reward.clamp(max=1.5) - 1).abs().sum()
    assert logged(trained, "gdc/clipped") == pytest.approx([(lost / (lost + kept)).item()], rel=1e-4)
    assert "`max_pseudo_reward` = 1.5 moves the optimum off the posterior" in caplog.text
    plain = trainer(toy, gdc_config(tmp_path))
    plain.train()
    assert logged(plain, "gdc/clipped") == []
    with pytest.raises(ValueError, match="`max_pseudo_reward` must be positive"):
        gdc_config(tmp_path, max_pseudo_reward=-1.0)


@pytest.mark.parametrize("replay_batches", [1, 2])
def test_the_temperature_goes_down_to_the_posterior_asked_for(toy, tmp_path, replay_batches):
    changes = {"max_steps": 6, "learning_rate": 0.0, "replay_batches": replay_batches}
    sizes = {"per_device_train_batch_size": 384, "num_generations": 128}
    args = gdc_config(tmp_path, beta_init=4.0, beta_init_steps=3, **changes, **sizes)
    trained = trainer(toy, args)
    trained.train()
    betas = [4.0, 4.0 / 2, 4.0 / 4, 0.5, 0.5, 0.5]
    assert logged(trained, "gdc/beta") == pytest.approx(betas)
    # the policy is the prior: its distance from the target grows as the target leaves it
    found, powers = logged(trained, "posterior/forward_kl"), [0.5 / beta for beta in betas]
    for value, log_z, power in zip(found, logged(trained, "posterior/log_z"), powers, strict=True):
        evidence = power * toy.log_likelihood
        assert value == pytest.approx(toy.forward_kl(toy.model, evidence).mean().item(), rel=0.3)
        assert log_z == pytest.approx(toy.log_z(evidence).mean().item(), abs=0.05)
    assert found[0] < found[1] < found[2] < found[3]


def test_annealing_a_likelihood_leaves_what_is_forbidden_forbidden(toy, tmp_path):
    def allowed(completion_ids, **kwargs):
        return [0 not in ids for ids in completion_ids]

    args = gdc_config(tmp_path, beta=None, beta_init=10.0, max_steps=2)
    trained = trainer(toy, args, likelihood=Constraint(allowed))
    trained.train()
    assert logged(trained, "gdc/beta") == pytest.approx([10.0, 1.0])
    # a condition is the same at every temperature
    assert max(logged(trained, "posterior/log_z")) <= 0
    assert logged(trained, "posterior/satisfaction")[0] < 1
    assert set(trained.batches[0]["log_likelihood"].tolist()) == {0.0, -math.inf}


def test_replay_takes_the_z_that_is_known_now(toy, tmp_path):
    seen = []
    args = gdc_config(tmp_path, replay_batches=4, max_steps=4, beta_init=2.0, beta_init_steps=3, learning_rate=0.0)
    trained = trainer(toy, args)
    next_step = trained.objective.step

    def recorded(batches, new_rollout):
        step = next_step(batches, new_rollout)
        known = trained.objective.target.log_z(step.batches[0].prompt_keys)
        seen.append((len(trained.objective.replay.rollouts), torch.equal(step.batches[0].log_z, known)))
        return step

    trained.objective.step = recorded
    trained.train()
    assert seen == [(1, True), (2, True), (3, True), (4, True)]


@pytest.mark.parametrize("proposal", ["policy", "adaptive", "prior"])
def test_draws_from_the_prior_come_before_the_first_step(toy, tmp_path, proposal):
    """Nothing is learnt from them, nothing logged: they tell Z."""
    asked = []

    def reward(completions, completion_ids, **kwargs):
        asked.append(list(kwargs["prompts"]))
        return toy_reward(kwargs["prompts"], completions, completion_ids)

    known, policy = [], toy.random_policy(noise=0.05, seed=2)

    class Known(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            known.append(trained.objective.target.normalizers.log_z(trained.rollouts[0].prompt_keys.unique()))

    changes = {"prior_samples": 128, "max_steps": 2, "learning_rate": 0.01, "proposal": proposal}
    trained = trainer(
        toy,
        gdc_config(tmp_path, **changes),
        policy,
        reward,
        ref_model=toy.random_policy(0.0),
        callbacks=[Known()],
        train_dataset=prompts_of(toy, 2),
    )
    before = weights(trained.model)
    trained.train()
    # 128 of each prompt, although a prompt comes twice
    first = [prompt for batch in asked[:-2] for prompt in batch]
    assert [first.count(prompt) for prompt in toy.prompts] == [128] * 3
    assert len(asked) == 16 + 2
    p = (toy.log_posterior() + toy.log_likelihood).exp().sum(-1) / toy.log_z().exp()  # E_p[w]/Z
    se = ((p - 1) / 128).sqrt()
    # in the order of the keys: compare as sets
    truth = toy.log_z().sort()
    errors = (known[0].sort().values - truth.values.double()) / se[truth.indices]
    assert errors.abs().max() < 4.5, errors
    for rollout in trained.rollouts[:16]:
        assert torch.equal(rollout.log_proposal, rollout.ref_token_log_probs.sum(-1))
    drew = trained.rollouts[16]
    drawn_by = {"policy": drew.token_log_probs, "adaptive": drew.token_log_probs, "prior": drew.ref_token_log_probs}
    torch.testing.assert_close(drew.log_proposal, drawn_by[proposal].sum(-1))
    for name in ("reward", "posterior/forward_kl", "gdc/beta", "num_tokens"):
        assert len(logged(trained, name)) == 2, name
    rewards = drew.rewards
    assert logged(trained, "reward")[0] == pytest.approx(rewards.mean().item(), rel=1e-4)
    assert all(len(values) <= 2 * 24 for values in (trained._logs["prompt"], trained._logs["completion"]))
    assert largest_change(before, weights(trained.model)) > 0


@pytest.mark.slow
def test_draws_from_the_prior_tell_the_log_variance_loss_of_a_condition_z(toy, tmp_path):
    def allowed(completion_ids, **kwargs):
        return [0 not in ids for ids in completion_ids]

    args = gdc_config(tmp_path, beta=None, divergence="log_variance", prior_samples=512, learning_rate=0.0)
    trained = trainer(toy, args, likelihood=Constraint(allowed))
    trained.train()
    chosen = torch.tensor(allowed(toy.completion_ids))
    share = (toy.log_prior.exp() * chosen).sum(-1).sort().values  # (P,)
    found = trained.batches[-1]["log_z"].exp().view(3, 8)[:, 0].sort().values
    se = (share * (1 - share) / 512).sqrt()
    assert ((found - share) / se).abs().max() < 4.5


def test_a_stream_has_no_prompts_to_draw_for_before_training(toy, tmp_path):
    stream = prompts_of(toy).to_iterable_dataset()
    with pytest.raises(ValueError, match="`prior_samples` must be 0 with a stream as `train_dataset`, got 8"):
        trainer(toy, gdc_config(tmp_path, prior_samples=8), train_dataset=stream)


def test_a_resumed_run_draws_no_more_from_the_prior(toy, tmp_path):
    calls = []

    def reward(prompts, completions, completion_ids, **kwargs):
        calls.append(len(prompts))
        return toy_reward(prompts, completions, completion_ids)

    changes = {"prior_samples": 16, "save_strategy": "steps", "save_steps": 2}
    trainer(toy, gdc_config(tmp_path, max_steps=2, **changes), None, reward).train()
    assert len(calls) == 2 + 2
    resumed = trainer(toy, gdc_config(tmp_path, max_steps=3, **changes), None, reward)
    resumed.train(resume_from_checkpoint=True)
    assert len(calls) == 2 + 2 + 1


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha"])
def test_evidence_of_hundreds_of_nats_leaves_gradients_finite(toy, tmp_path, divergence):
    """A first hit among completions that are almost impossible: p/π would be e²⁰⁰ by the others alone."""

    def nearly_never_a(completion_ids, **kwargs):
        return [-200.0 * (0 in ids) for ids in completion_ids]

    alpha = {"alpha": 0.5} if divergence == "alpha" else {}
    args = gdc_config(tmp_path, beta=1.0, divergence=divergence, max_steps=6, learning_rate=0.0, **alpha)
    trained = trainer(toy, args, None, nearly_never_a)
    trained.train()
    hits = [(batch["log_likelihood"].view(3, 8) == 0).sum(-1).min() for batch in trained.batches]
    assert 1 in hits
    assert logged(trained, "nonfinite_steps") == [0.0] * 6
    assert max(logged(trained, "loss")) < 100
