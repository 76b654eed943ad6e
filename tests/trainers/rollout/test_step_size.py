"""How far optimizer steps move the policy, against enumeration, and the learning rate that follows from it."""

import logging
import statistics

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerCallback

from rlhf_bayes.lm import enable_completion_scoring, score_completions
from rlhf_bayes.trainers.rollout.prior_draws import PriorDraws
from rlhf_bayes.trainers.rollout.step_size import STEP_COMPLETIONS, STEP_SHARE

from ..training import config, gdc_config, largest_change, logged, trainer, weights

ADAM = {"optim": "adamw_torch"}
SIZES = {"per_device_train_batch_size": 96, "num_generations": 32}  # the 3 prompts of the toy


class ExactSteps(TrainerCallback):
    """KL(π‖π') of each optimizer step and KL(π‖π*) before it, by enumeration, means over prompts."""

    def __init__(self, toy):
        self.toy, self.kls, self.gaps, self.before = toy, [], [], None

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before = self.toy.log_probs(model).detach()
        gaps = (self.before.exp() * (self.before - self.toy.log_posterior())).sum(-1)
        self.gaps.append(gaps.mean().item())

    def on_step_end(self, args, state, control, model, **kwargs):
        after = self.toy.log_probs(model).detach()
        self.kls.append((self.before.exp() * (self.before - after)).sum(-1).mean().item())


@pytest.mark.parametrize("of", [config, gdc_config])
def test_the_kl_of_a_step_is_that_by_enumeration(toy, tmp_path, of):
    exact = ExactSteps(toy)
    args = of(tmp_path, max_steps=12, **SIZES, **ADAM, learning_rate=3e-3, adapt_learning_rate=True)
    trained = trainer(toy, args, callbacks=[exact])
    trained.train()
    ratios = [a / b for a, b in zip(logged(trained, "step_kl"), exact.kls, strict=True)]
    # k3 of one step has a relative error of about √2/√96 = .14, and the completions were drawn by the policy
    assert statistics.mean(ratios) == pytest.approx(1.0, abs=4 * 0.15 / len(ratios) ** 0.5)


def noise(prompts, **columns):
    """A reward that says nothing, so that the gradient never becomes small."""
    return torch.randn(len(prompts)).tolist()


def test_steps_are_as_long_as_wanted(toy, tmp_path):
    exact = ExactSteps(toy)
    args = config(tmp_path, max_steps=40, **SIZES, **ADAM, learning_rate=None)
    trained = trainer(toy, args, reward_funcs=noise, callbacks=[exact])
    trained.train()
    wanted = STEP_SHARE * trained.alarms.prior.distance(0.5) * 96 / STEP_COMPLETIONS
    # KL/η² varies tenfold from step to step; at the rate of the first step the ratio is 1e-5
    assert 0.25 < statistics.geometric_mean(exact.kls[8:20]) / wanted < 4  # each of them is measured
    rates = logged(trained, "learning_rate")
    assert rates[0] == pytest.approx(1e-6)
    assert len({round(rate, 12) for rate in rates[:20]}) > 15


@pytest.mark.parametrize("of", [config, gdc_config])
def test_what_remains_is_that_by_enumeration(toy, tmp_path, of):
    exact = ExactSteps(toy)
    trained = trainer(toy, of(tmp_path, max_steps=60, **SIZES, **ADAM, learning_rate=None), callbacks=[exact])
    trained.train()
    expected = exact.gaps[0]
    for gap in exact.gaps:
        expected += (gap - expected) / 10
    assert exact.gaps[-1] < expected < 0.5 * exact.gaps[0]
    # a running mean with weight 1/10 has the error of one rollout times √(1/19)
    error = statistics.mean(logged(trained, "posterior/gap_standard_error")) / 19**0.5
    assert trained.step_size.state_dict()["remaining"] == pytest.approx(expected, abs=4 * error)


def test_steps_are_shorter_the_less_remains(toy, tmp_path):
    trained = trainer(toy, config(tmp_path, **SIZES, learning_rate=None))
    step_size, distance = trained.step_size, trained.alarms.prior.distance(0.5)
    step_size.note("posterior/gap", 5 * distance)
    assert step_size._to_go() == distance  # it is not adapted yet
    step_size.adapts = True
    for value in (0.0, float("nan"), float("inf"), 0.5 * distance):
        step_size.note("posterior/gap", value)
        step_size.note("posterior/log_z", 9.0)
    assert step_size._to_go() == pytest.approx((0.9 * 0.9 + 0.1 * 0.5) * distance)
    for value, found in ((-1.0, 0.05), (1e9, 2.0)):
        for _ in range(100):
            step_size.note("posterior/gap", value)
        assert step_size._to_go() == pytest.approx(found * distance, rel=1e-3)


def test_the_schedule_multiplies_it(toy, tmp_path):
    args = config(tmp_path, max_steps=40, **SIZES, **ADAM, learning_rate=None, lr_scheduler_type="linear")
    trained = trainer(toy, args, reward_funcs=noise)
    trained.train()
    rates = logged(trained, "learning_rate")
    assert max(rates) > 1e-5
    # it is measured at step 30 last; then the line to 0 is all that changes it
    assert rates[32:] == pytest.approx([rates[-1] * left for left in range(8, 0, -1)])


def test_a_given_rate_is_left_alone(toy, tmp_path):
    trained = trainer(toy, config(tmp_path, max_steps=8, **ADAM, learning_rate=1e-3))
    trained.train()
    assert logged(trained, "learning_rate") == [1e-3] * 8
    assert len(logged(trained, "step_kl")) == 1


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 1.0),
        ({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 24}, 1.0),
        ({"num_iterations": 4}, 0.25),
        ({"per_device_train_batch_size": 24, "steps_per_generation": 4, "num_iterations": 2}, 0.125),
    ],
)
def test_a_completion_moves_the_policy_as_far_however_it_is_used(toy, tmp_path, changes, share):
    trained = trainer(toy, config(tmp_path, **SIZES | {"learning_rate": None} | changes))
    assert trained.step_size._wanted_kl(2.0) == pytest.approx(2.0 * STEP_SHARE * share * 96 / 64)


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(toy, tmp_path):
    changes = {"max_steps": 10, **ADAM, "learning_rate": None, "save_strategy": "steps", "save_steps": 6}
    whole = trainer(toy, config(tmp_path / "whole", **changes))
    whole.train()
    resumed = trainer(toy, config(tmp_path / "whole", **changes))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")
    assert largest_change(weights(whole.model), weights(resumed.model)) == 0.0
    assert resumed.step_size.state_dict() == whole.step_size.state_dict()


def test_an_optimizer_of_ones_own_keeps_its_rate(toy, tmp_path, caplog):
    policy = toy.random_policy(noise=0.0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    trained = trainer(toy, config(tmp_path, max_steps=3, learning_rate=None), policy, optimizers=(optimizer, None))
    with caplog.at_level(logging.WARNING):
        trained.train()
    assert "cannot be adapted: `optimizers` has its own" in caplog.text
    assert logged(trained, "learning_rate") == [0.5] * 3


def test_half_precision_keeps_the_rate_and_says_so(toy, tmp_path, caplog):
    policy = toy.random_policy(noise=0.0).bfloat16()
    trained = trainer(toy, config(tmp_path, max_steps=2, learning_rate=None), policy)
    with caplog.at_level(logging.WARNING):
        trained.train()
    assert "cannot be adapted: the policy is computed in half precision" in caplog.text
    assert logged(trained, "learning_rate") == [1e-6] * 2


def test_under_autocast_it_is_measured_in_full_precision(toy, tmp_path):
    trained = trainer(toy, config(tmp_path, max_steps=1, learning_rate=None, bf16=True))
    log_probs, seen = trained.step_size._log_probs, []
    trained.step_size._log_probs = lambda step: seen.append((step.batches[0], log_probs(step))) or seen[-1][1]
    trained.train()
    batch, found = seen[0]
    prior = toy.random_policy(noise=0.0)
    enable_completion_scoring(prior)
    exact = score_completions(prior, *batch.sequences).log_probs.detach()
    mask = batch.completion_mask[:, : exact.size(1)].bool()
    assert_close(found[:, : exact.size(1)], torch.where(mask, exact, 0.0), atol=1e-5, rtol=0)  # .03 under autocast
    assert trained.model.forward != trained.model._original_forward  # training goes on under autocast


@pytest.mark.parametrize(("rate", "kind"), [(1e-7, "standstill"), (3e-3, None)])
def test_a_rate_that_leads_nowhere_is_said_early(toy, tmp_path, caplog, rate, kind):
    trained = trainer(toy, config(tmp_path, max_steps=6, **SIZES, **ADAM, learning_rate=rate), reward_funcs=noise)
    with caplog.at_level(logging.WARNING):
        trained.train()
    assert (kind in trained.alarms.raised) or (kind is None and not trained.alarms.raised)
    assert ("This training will not move" in caplog.text) == (kind == "standstill")


def test_the_distance_of_the_prior(toy):
    draws = PriorDraws()
    assert draws.distance(toy.beta) == 1.0
    generator = torch.Generator().manual_seed(0)
    index = torch.multinomial(toy.log_prior.exp(), 4000, replacement=True, generator=generator)  # (P, n)
    rewards, log_prior = toy.rewards.gather(1, index), toy.log_prior.gather(1, index)
    keys = torch.arange(len(toy.prompts)).repeat_interleave(4000)
    draws.add(keys, rewards.flatten().double(), log_prior.flatten().double())
    exact = (toy.log_prior.exp() * (toy.log_prior - toy.log_posterior())).sum(-1).mean().item()
    error = (toy.rewards / toy.beta).std(-1).mean().item() / 4000**0.5
    assert draws.distance(toy.beta) == pytest.approx(exact, abs=6 * error)
    assert draws.distance(0.0) == 1.0
    forbidden = PriorDraws()
    forbidden.add(torch.zeros(8, dtype=torch.long), torch.tensor([0.0] * 2 + [-torch.inf] * 6), torch.zeros(8))
    assert forbidden.distance(1.0) == pytest.approx(torch.tensor(4.0).log().item())  # KL(π*‖π0) = −log(1/4)
