"""Posteriors of many β from draws of the prior, against enumeration."""

import math

import pytest
import torch

from rlhf_bayes.numerics import what_if

BETAS = [4.0, 1.0, 0.5]


def exact(toy, beta):
    """E[r], KL to the prior and log Z of each prompt's posterior, by enumeration: three of (P,)."""
    evidence = toy.rewards / beta
    log_posterior = toy.log_posterior(evidence).double()
    reward = (log_posterior.exp() * toy.rewards).sum(-1)
    kl = (log_posterior.exp() * (log_posterior - toy.log_prior)).sum(-1)
    return reward, kl, toy.log_z(evidence)


def rewards_of_draws(toy, n, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(toy.log_prior.exp(), n, replacement=True, generator=generator)  # (P, n)
    return toy.rewards.gather(1, index)


def test_each_beta_agrees_with_enumeration(large_toy):
    found = what_if(rewards_of_draws(large_toy, 20_000, seed=0), BETAS)
    assert [row.beta for row in found] == BETAS
    for row in found:
        for name, truth in zip(("reward", "kl_to_prior", "log_z"), exact(large_toy, row.beta), strict=True):
            error = getattr(row, f"{name}_standard_error")
            assert 0 < error < 0.05
            assert abs(getattr(row, name) - truth.mean().item()) < 4 * error, name
        assert row.trustworthy


def test_standard_errors_cover(large_toy):
    """Over 300 sets of 500 draws, 95 % intervals hold the truth 95 % of the time, within 4 standard errors."""
    truth = {name: value.mean().item() for name, value in zip(NAMES, exact(large_toy, 1.0), strict=True)}
    hits = dict.fromkeys(NAMES, 0)
    for seed in range(300):
        (row,) = what_if(rewards_of_draws(large_toy, 500, seed), [1.0])
        for name in NAMES:
            error = getattr(row, f"{name}_standard_error")
            hits[name] += abs(getattr(row, name) - truth[name]) < 1.96 * error
    assert {name: count / 300 for name, count in hits.items()} == pytest.approx(
        dict.fromkeys(NAMES, 0.95), abs=4 * math.sqrt(0.95 * 0.05 / 300)
    )


NAMES = ("reward", "kl_to_prior", "log_z")


def test_too_few_draws_for_a_small_beta_are_not_trusted(large_toy):
    rewards = rewards_of_draws(large_toy, 500, seed=1)
    close, far = what_if(rewards, [1.0, 0.02])
    assert close.trustworthy
    assert not far.trustworthy
    assert far.importance_ess < 10 < close.importance_ess
    assert not what_if(rewards[:, :24], [100.0])[0].trustworthy


def test_nearly_equal_weights_of_few_draws_are_trusted(large_toy):
    # 32 draws of each of 3 prompts, at a β where an effective sample size of nearly 32 is left
    rows = [what_if(rewards_of_draws(large_toy, 32, seed), [8.0])[0] for seed in range(20)]
    assert min(row.importance_ess for row in rows) > 25
    assert sum(row.trustworthy for row in rows) >= 18


def test_bounds_hold_where_nothing_can_be_trusted(large_toy):
    truth = {
        beta: [value.mean().item() for value in exact(large_toy, beta)] for beta in (1.0, 0.1, 0.05)
    }  # E[r], KL, log Z
    held = dict.fromkeys(NAMES, 0)
    for seed in range(200):
        close, *far = what_if(rewards_of_draws(large_toy, 60, seed), [1.0, 0.1, 0.05])
        for row in far:
            assert not row.trustworthy
            for name, value in zip(NAMES, truth[row.beta], strict=True):
                bound = getattr(row, f"{name}_at_least")
                held[name] += bound <= value
                # those of a larger β hold for a smaller one, so no bound falls
                assert name == "log_z" or bound >= getattr(close, f"{name}_at_least")
        assert close.reward_at_least < close.reward
    assert min(held.values()) / 400 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 200)
    assert far[-1].log_z_at_least > 0.5 * truth[0.05][2]  # and says something


def test_forbidden_completions_have_no_weight():
    allowed = torch.tensor([[0.0, 1.0, -math.inf, 0.5], [0.2, -math.inf, -math.inf, 0.2]])
    (row,) = what_if(allowed, [0.5])
    weights = torch.tensor([0.0, 2.0, 1.0]).exp()
    first = (weights * torch.tensor([0.0, 1.0, 0.5])).sum() / weights.sum()
    assert row.reward == pytest.approx((first.item() + 0.2) / 2)
    assert row.log_z == pytest.approx(((weights.sum() / 4).log().item() + 0.4 + math.log(0.5)) / 2)


def test_a_constant_reward_moves_nothing():
    (row,) = what_if(torch.full((2, 50), 0.7), [0.1])
    assert (row.reward, row.kl_to_prior, row.log_z) == pytest.approx((0.7, 0.0, 7.0))
    assert (row.importance_ess, row.trustworthy) == (pytest.approx(50), True)


@pytest.mark.parametrize(
    ("rewards", "betas", "message"),
    [
        (torch.zeros(5), [1.0], r"got \(5,\)"),
        (torch.zeros(5, 1), [1.0], "one has no spread"),
        (torch.tensor([[0.0, math.nan]]), [1.0], "finite or -inf"),
        (torch.tensor([[0.0, math.inf]]), [1.0], "finite or -inf"),
        (torch.zeros(2, 30), [1.0, 0.0], "positive and finite, got 0.0"),
        (torch.zeros(2, 30), [math.inf], "positive and finite, got inf"),
    ],
)
def test_bad_input_is_refused(rewards, betas, message):
    with pytest.raises(ValueError, match=message):
        what_if(rewards, betas)
