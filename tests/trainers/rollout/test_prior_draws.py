"""What draws of the prior say before a training, against enumeration."""

import re

import pytest
import torch
from scipy.stats import ttest_ind

from rlhf_bayes.trainers.rollout.prior_draws import ByPrompt, PriorDraws, what_is_asked_for


def draws_of(toy, n, seed=0):
    index = torch.multinomial(
        toy.log_prior.exp(), n, replacement=True, generator=torch.Generator().manual_seed(seed)
    )  # (P, n)
    return toy.rewards.gather(1, index).double(), toy.log_prior.gather(1, index).double()


def kl_of_the_posterior(toy, beta):
    log_posterior = toy.log_posterior(toy.rewards / beta)
    return (log_posterior.exp() * (log_posterior - toy.log_prior)).sum(-1).mean().item()


def test_a_posterior_that_can_be_measured(large_toy):
    text = what_is_asked_for(draws_of(large_toy, 400)[0], 1.0, is_reward=True)
    value, error = map(float, re.search(r"is (\S+) ± (\S+) nats from the prior", text).groups())
    assert abs(value - kl_of_the_posterior(large_toy, 1.0)) < 4 * error + 0.005
    (needed,) = map(int, re.search(r"measured with (\d+) completions a prompt", text).groups())
    assert 25 <= needed <= 400
    assert "cannot" not in text


def test_a_posterior_that_cannot_names_what_would_do(large_toy):
    text = what_is_asked_for(draws_of(large_toy, 64)[0], 0.05, is_reward=True)
    (bound,) = map(float, re.search(r"is at least (\S+) nats from the prior", text).groups())
    assert 0 < bound < kl_of_the_posterior(large_toy, 0.05)
    (needed,) = re.search(r"at least ([\d,]+) completions a prompt would be needed", text).groups()
    assert int(needed.replace(",", "")) > 64
    (other,) = map(float, re.search(r"or β = (\S+), which 64 can measure", text).groups())
    assert other > 0.05
    nats = what_is_asked_for(draws_of(large_toy, 64)[0] / 0.05, 1.0, is_reward=False)
    assert "β" not in nats  # a likelihood has none
    assert "reward" not in nats


def test_a_condition_that_no_draw_meets():
    text = what_is_asked_for(torch.full((2, 30), -torch.inf), 1.0, is_reward=False)
    assert "allows none of the 30 draws" in text


def test_draws_are_kept_by_prompt_and_survive_a_checkpoint(large_toy):
    rewards, log_prior = draws_of(large_toy, 40)
    keys = torch.tensor([7, -3, 12]).repeat(40)  # prompts alternate
    draws = PriorDraws()
    draws.add(keys[:60], rewards.T.flatten()[:60], log_prior.T.flatten()[:60])
    draws.add(keys[60:], rewards.T.flatten()[60:], log_prior.T.flatten()[60:])
    twin = PriorDraws()
    twin.load_state_dict(draws.state_dict())
    for some in (draws, twin):
        assert some.rewards_of_prompts().equal(rewards[[1, 0, 2]])  # by key
        assert some.mean_rewards().mean.tolist() == pytest.approx(rewards[[1, 0, 2]].mean(-1).tolist())
        assert some.mean_rewards().keys.tolist() == [-3, 7, 12]


def test_entropies_of_the_posterior_and_their_errors(large_toy):
    log_posterior = large_toy.log_posterior(large_toy.rewards / 1.0).double()
    truth, off = -(log_posterior.exp() * log_posterior).sum(-1), []
    for seed in range(60):
        draws = PriorDraws()
        rewards, log_prior = draws_of(large_toy, 500, seed)
        draws.add(torch.arange(3).repeat_interleave(500), rewards.flatten(), log_prior.flatten())
        found = draws.posterior_entropies(1.0)
        off.append((found.mean - truth) / found.variance.sqrt())
    off = torch.stack(off)
    assert off.mean().abs() < 0.4  # a bias of order 1/n
    assert off.std() == pytest.approx(1.0, abs=0.2)
    few = PriorDraws()
    few.add(torch.zeros(20, dtype=torch.long), torch.zeros(20).double(), torch.zeros(20).double())
    assert few.posterior_entropies(1.0) is None


def test_comparisons_of_other_prompts_are_welchs_test():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    low, high = (ByPrompt(torch.arange(6) + shift, x, torch.ones(6)) for shift, x in ((0, a - 1.5), (50, b)))
    p = ttest_ind(a.numpy() - 1.5, b.numpy(), equal_var=False, alternative="less").pvalue
    assert low.is_below(high, p * 1.001)
    assert not low.is_below(high, p * 0.999)
    assert not ByPrompt(low.keys[:3], low.mean[:3], low.variance[:3]).is_below(high, 1.0)  # too few prompts
