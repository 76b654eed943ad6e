"""Best of n on an enumerated model: its distribution and its KL, ties included; not the posterior."""

import math

import pytest
import torch

from rlhf_bayes import numerics
from rlhf_bayes.numerics import best_of_n_kl, best_of_n_kl_bound
from rlhf_bayes.samplers import BestOfN, Sampler

from .enumerated import assert_draws_follow, counts_of, few_a, prior_of, seeded


def rounded_length(completion_ids, **kwargs):
    """A reward with ties: tokens, less those that are "a"."""
    return [float(len(ids) - ids.count(0)) for ids in completion_ids]


def best_of_n(toy, values, n):
    """log-probability (P, N) of each completion, from the probability of each reward."""
    p = toy.log_prior.double().exp()
    above, below = ((p[:, None, :] * (f(values[None, :], values[:, None]))).sum(-1) for f in (torch.le, torch.lt))
    return (p * (above**n - below**n) / (above - below)).log()


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 8])
def test_its_distribution_and_its_kl(toy, n):
    values = torch.tensor(rounded_length(completion_ids=toy.completion_ids))
    log_prob = best_of_n(toy, values, n)
    sampler: Sampler = BestOfN(n)
    draws = sampler.sample(prior_of(toy).tilt(rounded_length, 0.5), toy.prompts, 1000, seeded())
    assert draws.guarantee == "none"
    assert_draws_follow(toy, draws, log_prob)
    for prompt in range(3):
        exact = float(numerics.forward_kl(log_prob[prompt], toy.log_prior[prompt].double()))
        assert float(best_of_n_kl(values, n, toy.log_prior[prompt])) == pytest.approx(exact, abs=1e-5)
        assert draws.info["kl_to_prior"][prompt] == pytest.approx(exact, abs=0.06)
        assert exact <= draws.info["kl_bound"] + 1e-12  # with n = 1 both are 0, up to rounding
    assert draws.info["kl_bound"] == math.log(n) - (n - 1) / n
    if n == 8:  # the bound is far off where rewards tie
        assert max(draws.info["kl_to_prior"]) < draws.info["kl_bound"] - 0.05


def test_it_does_not_target_the_posterior(toy):
    """The same draws for every β, which the posterior depends on."""
    draws = [
        BestOfN(4).sample(prior_of(toy).tilt(rounded_length, beta), toy.prompts, 50, seeded()) for beta in (0.1, 9)
    ]
    assert draws[0].completion_ids == draws[1].completion_ids


def test_without_ties_the_bound_is_reached():
    rewards = torch.randn(1000, generator=seeded()).double()
    for n in (1, 2, 16):
        assert float(best_of_n_kl(rewards, n)) == pytest.approx(best_of_n_kl_bound(n), abs=1e-9)
    # many completions of equal probability: near it, from below
    enumerated = float(best_of_n_kl(rewards, 16, torch.full((1000,), -math.log(1000))))
    assert best_of_n_kl_bound(16) - 0.01 < enumerated < best_of_n_kl_bound(16)


def test_ties_in_a_sample():
    """Half of the prior has reward 0, the rest is continuous: exactly, by the integral and the point mass."""
    rewards = torch.rand(100_000, generator=seeded()).double()
    rewards = torch.where(torch.rand(100_000, generator=seeded(1)) < 0.5, 0.0, rewards)
    n = 4
    point = 0.5**n * math.log(0.5**n / 0.5)
    u = torch.linspace(0.5, 1, 100_001).double()
    rest = torch.trapezoid(n * u ** (n - 1) * (n * u ** (n - 1)).log(), u)
    assert float(best_of_n_kl(rewards, n)) == pytest.approx(point + float(rest), abs=0.005)
    assert float(best_of_n_kl(torch.zeros(50), n)) == 0.0


def test_conditions_and_seeds(toy):
    posterior = prior_of(toy).condition(few_a)
    first, again, other = (BestOfN(16).sample(posterior, toy.prompts, 40, seeded(s)) for s in (0, 0, 1))
    assert first.completion_ids == again.completion_ids != other.completion_ids
    assert all(few_a(first.completions))  # 16 draws at 0.31 or more: none fails in 400 runs
    assert (counts_of(toy, first).sum(-1) == 40).all()
    with pytest.raises(ValueError, match="None of 8 completions drawn is allowed"):
        BestOfN(4).sample(prior_of(toy).condition(lambda completions, **k: [0] * len(completions)), ["a"], 2)


def test_what_is_refused(toy):
    with pytest.raises(ValueError, match="`num_candidates` must be an integer of at least 1, got 0"):
        BestOfN(0)
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1, got 0"):
        BestOfN(2).sample(prior_of(toy).condition(few_a), ["a"], 0)
    for wrong in (torch.zeros(0), torch.tensor([math.nan]), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"`rewards` must be \(N,\)"):
            best_of_n_kl(wrong, 2)
