"""Alarms fire on policies that are known to be in trouble, and stay silent on those that are not."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from rlhf_bayes.trainers.rollout.alarms import Alarms

BETA = 0.5


@pytest.fixture
def alarms():
    args = SimpleNamespace(
        learning_rate=1e-3, stop_on_collapse=False, per_device_train_batch_size=64, gradient_accumulation_steps=1,
        world_size=1, save_strategy="steps", adapt_learning_rate=False,
    )  # fmt: skip
    accelerator = SimpleNamespace(gather=lambda rows: rows, process_index=0)
    state = SimpleNamespace(global_step=0, max_steps=100)
    return Alarms(SimpleNamespace(args=args, accelerator=accelerator, state=state, beta=BETA, mode="train"))


def rollout(toy, log_policy, n, seed, drawn_from="policy"):
    """n completions of each prompt of an enumerated policy (P, N), or of the prior."""
    generator = torch.Generator().manual_seed(seed)
    log_prior = toy.log_prior.double()
    source = log_prior if drawn_from == "prior" else log_policy
    index = torch.multinomial(source.exp(), n, replacement=True, generator=generator)  # (P, n)
    columns = [table.double().gather(1, index).flatten() for table in (toy.rewards, log_policy, log_prior)]
    keys = torch.arange(len(toy.prompts)).repeat_interleave(n)
    return SimpleNamespace(
        rewards=columns[0], token_log_probs=columns[1][:, None], ref_token_log_probs=columns[2][:, None],
        token_kl=None, prompt_keys=keys, drawn_from=drawn_from,
    )  # fmt: skip


def tilted(toy, power):
    """The prior tilted by a multiple of the evidence: 0 is the prior, 1 the posterior."""
    return (toy.log_prior.double() + power * toy.rewards.double() / BETA).log_softmax(-1)


def after(alarms, toy, power, repeats=20, prior_draws=200):
    """The alarms after draws of the prior and rollouts of a policy."""
    alarms.see(rollout(toy, tilted(toy, power), prior_draws, seed=99, drawn_from="prior"))
    for step in range(1, repeats + 1):
        alarms.trainer.state.global_step = step
        alarms.see(rollout(toy, tilted(toy, power), 8, seed=step))
    return alarms.raised


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1).mean()


@pytest.mark.parametrize("power", [0.0, 0.02, 0.5, 1.0, 1.2])
def test_silence_between_prior_and_posterior(alarms, large_toy, power):
    assert after(alarms, large_toy, power, repeats=60) == {}


def test_harm_is_an_elbo_below_the_priors(alarms, large_toy, caplog):
    toy, log_policy = large_toy, tilted(large_toy, -1.0)
    elbo = (log_policy.exp() * (toy.rewards / BETA - log_policy + toy.log_prior)).sum(-1).mean()
    prior = (toy.log_prior.exp() * toy.rewards / BETA).sum(-1).mean()
    assert elbo < prior - 0.5  # by enumeration
    with caplog.at_level(logging.WARNING):
        raised = after(alarms, toy, -1.0, repeats=40)
    assert "harm" in raised
    assert [record.message for record in caplog.records].count(raised["harm"]) == 1  # once
    assert "now 0.001" in raised["harm"]


def test_the_first_rollouts_of_an_untrained_policy_are_the_priors(alarms, large_toy):
    for seed in range(8):
        alarms.see(rollout(large_toy, tilted(large_toy, 0.0), 8, seed))
    assert len(alarms.prior) == 8 * 8 * len(large_toy.prompts)
    for step in range(1, 40):
        alarms.trainer.state.global_step = step
        alarms.see(rollout(large_toy, tilted(large_toy, -1.0), 8, seed=step))
    assert "harm" in alarms.raised


def test_prompts_that_the_prior_did_not_see_are_compared_over_prompts(alarms, large_toy):
    """Each rollout has prompts of its own, whose rewards differ by more than the draws of a prompt."""

    def moved(power, seed, drawn_from="policy"):
        found = rollout(large_toy, tilted(large_toy, power), 8, seed, drawn_from)
        found.prompt_keys = found.prompt_keys + 1000 * seed
        found.rewards = found.rewards + torch.randn(1, generator=torch.Generator().manual_seed(seed)).double()
        return found

    for seed in range(10):
        alarms.see(moved(0.0, seed, "prior"))
    for step in range(10, 60):
        alarms.trainer.state.global_step = step
        alarms.see(moved(0.0, step))
    assert alarms.raised == {}
    for step in range(60, 80):
        found = moved(0.0, step)
        found.token_log_probs = found.token_log_probs + 20.0  # a KL of 20 nats
        alarms.see(found)
    assert list(alarms.raised) == ["harm"]


def test_collapse_is_an_entropy_below_the_posteriors(alarms, large_toy):
    far = tilted(large_toy, 3.0)
    assert entropy(far) < 0.8 * entropy(tilted(large_toy, 1.0))  # by enumeration
    raised = after(alarms, large_toy, 3.0, repeats=40, prior_draws=2000)
    assert "collapse" in raised
    found = alarms.prior.posterior_entropies(BETA)
    error = found.variance.sum().sqrt() / len(found.mean)
    assert abs(found.mean.mean() - entropy(tilted(large_toy, 1.0))) < 4 * error


def test_without_draws_of_the_prior_nothing_is_claimed(alarms, large_toy):
    for step in range(1, 40):
        alarms.trainer.state.global_step = step
        alarms.see(rollout(large_toy, tilted(large_toy, 3.0), 8, seed=step))
    assert alarms.raised == {}


@pytest.mark.parametrize(("power", "expected"), [(1e-5, ["standstill"]), (0.3, [])])
def test_standstill(alarms, large_toy, power, expected):
    after(alarms, large_toy, power)
    assert alarms.raised == {}
    alarms.on_train_end(alarms.trainer.args, alarms.trainer.state, None)
    assert list(alarms.raised) == expected


def test_no_standstill_where_there_is_nothing_to_learn(alarms, large_toy):
    for step in range(1, 20):
        alarms.trainer.state.global_step = step
        found = rollout(large_toy, tilted(large_toy, 0.0), 8, seed=step)
        found.rewards = torch.zeros_like(found.rewards)
        alarms.see(found)
    alarms.on_train_end(alarms.trainer.args, alarms.trainer.state, None)
    assert alarms.raised == {}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("gdc/step_ess", [1.2, 1.6] * 10, ["noise"]),
        ("gdc/step_ess", [2.0, 9.0] * 10, []),
        ("gdc/step_ess", [1.2] * 19, []),  # too few steps to tell
        ("posterior/khat", [0.9, 1.2] * 10, ["tail"]),
        ("posterior/khat", [0.2, 1.1] * 10, []),
        ("posterior/khat", [float("inf")] * 40, []),
        ("reward", [0.0] * 40, []),
    ],
)
def test_weights_of_gdc(alarms, name, values, expected):
    for value in values:
        alarms.note(name, value)
    assert list(alarms.raised) == expected


@pytest.mark.parametrize(
    ("of_distance", "adapts", "expected"),
    [(1.1, False, ["stride"]), (0.9, False, []), (1e-5, False, []), (9e-7, False, ["standstill"]), (9e-7, True, [])],
)
def test_steps_too_long_and_too_short(alarms, large_toy, of_distance, adapts, expected):
    alarms.note("step_kl", 1e-9)  # nothing is known of the posterior yet
    alarms.see(rollout(large_toy, tilted(large_toy, 0.0), 200, seed=99, drawn_from="prior"))
    alarms.trainer.args.adapt_learning_rate = adapts
    alarms.note("step_kl", of_distance * alarms.prior.distance(BETA))
    assert list(alarms.raised) == expected


def test_a_collapse_ends_the_run_only_where_asked(alarms, large_toy):
    after(alarms, large_toy, -1.0, repeats=40)
    args, control = alarms.trainer.args, TrainerControl()
    alarms.on_step_end(args, None, control)
    alarms.check()
    assert not control.should_training_stop
    args.stop_on_collapse = True
    alarms.on_step_end(args, None, control)
    assert control.should_training_stop
    assert control.should_save
    with pytest.raises(RuntimeError, match=r"`stop_on_collapse` ended the training\. This training does harm"):
        alarms.check()


def test_the_state_goes_on(alarms, large_toy):
    after(alarms, large_toy, -1.0, repeats=40)
    twin = Alarms(alarms.trainer)
    twin.load_state_dict(alarms.state_dict())
    assert twin.raised == alarms.raised
    assert twin.prior.mean_rewards().mean.equal(alarms.prior.mean_rewards().mean)
