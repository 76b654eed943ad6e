"""Chains on an enumerated model: the posterior is left invariant, reached, and told with the right error."""

import math

import pytest
import torch

from rlhf_bayes.numerics import effective_sample_size, rhat
from rlhf_bayes.samplers import MetropolisHastings, Sampler, expectation
from rlhf_bayes.samplers.metropolis_hastings import _SuffixChains
from rlhf_bayes.testing import toy_reward

from .enumerated import (
    assert_draws_follow,
    assert_within,
    chi_square_p,
    conditioned,
    counts_of,
    exact_draws,
    few_a,
    policy_of,
    prior_of,
    seeded,
)


def short_reward(prompts, completions, completion_ids, **kwargs):
    """As many completions of one and two tokens as of three: the acceptance ratio must allow for lengths."""
    rewards = toy_reward(prompts, completions, completion_ids)
    return [0.4 * reward - len(ids) for reward, ids in zip(rewards, completion_ids, strict=True)]


def short(toy):
    """A posterior of many lengths, and its log π* (P, N) by enumeration."""
    rewards = [short_reward([p] * len(toy.completions), toy.completions, toy.completion_ids) for p in toy.prompts]
    return prior_of(toy).tilt(short_reward, 1.0), toy.log_posterior(torch.tensor(rewards)).double()


def exact_mean(log_p, values):
    return (log_p.exp() * torch.tensor(values, dtype=torch.float64)).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["prior", "policy"])
def test_the_suffix_kernel_leaves_the_posterior_invariant(toy, proposal):
    """Exact draws, moved, are draws from the posterior still, whatever the kernel's cut and length."""
    posterior, log_p = short(toy)
    start = exact_draws(toy, log_p[0], 3000)
    q = posterior.prior if proposal == "prior" else policy_of(toy, noise=0.1)
    chains = _SuffixChains(posterior, q, start, None)
    for seed in range(4):
        chains.move(seeded(seed))
    counts = torch.zeros(len(toy.completion_ids), dtype=torch.float64)
    for row in chains.rows:
        counts[toy.completion_ids.index(row.completion_ids)] += 1
    assert chi_square_p(counts, log_p[0]) > 0.001
    assert 0.2 < chains.accepted.mean() / 4 < 0.9
    lengths = torch.tensor([len(row.completion_ids) for row in chains.rows])
    assert torch.bincount(lengths).min(dim=0).values == 0  # no completion of no token
    assert (torch.bincount(lengths)[1:] > 300).all()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["suffix", "independence"])
@pytest.mark.parametrize("proposal", ["prior", "policy"])
def test_chains_reach_the_posterior(toy, kernel, proposal):
    """One state of each of many chains: independent draws, from the posterior once the start is forgotten."""
    posterior, log_p = short(toy)
    q = None if proposal == "prior" else policy_of(toy)
    sampler: Sampler = MetropolisHastings(kernel, q, num_chains=300, burn_in=15)
    draws = sampler.sample(posterior, toy.prompts, 300, seeded())
    assert draws.counts.tolist() == [300] * 3
    assert (draws.guarantee, draws.log_weights) == ("consistent", None)
    assert_draws_follow(toy, draws, log_p)


@pytest.mark.slow
def test_means_have_the_error_that_is_claimed(toy):
    """100 runs of 4 chains: about 95 % of the intervals hold E[r], at an error wider than of independent draws."""
    posterior, log_p = short(toy)
    truth = exact_mean(log_p[1], toy.rewards[1].tolist())
    sampler = MetropolisHastings(num_chains=4, burn_in=8)
    draws = sampler.sample(posterior, [toy.prompts[1]] * 100, 200, seeded())
    rewards = toy_reward(draws.prompts, draws.completions, draws.completion_ids)
    estimate = expectation(draws, rewards)
    assert_within(estimate.mean.mean(), estimate.mean.std() / 10, truth, "E[r]")
    near = ((estimate.mean - truth).abs() <= 1.96 * estimate.standard_error).double().mean()
    assert near > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 100)
    independent = torch.tensor(rewards).view(100, 200).std(-1).mean() / math.sqrt(200)
    assert estimate.standard_error.mean() > 1.2 * independent


def test_what_is_told_of_the_chains(toy):
    posterior, _ = short(toy)
    sampler = MetropolisHastings(num_chains=3, burn_in=5, thin=2)
    draws = sampler.sample(posterior, toy.prompts, 60, seeded())
    evidence = posterior.log_likelihood(draws.prompts, draws.completions, draws.completion_ids).double()
    lengths = torch.tensor([len(ids) for ids in draws.completion_ids]).double()
    for prompt in range(3):
        chains = [values[draws.prompt_index == prompt].view(20, 3).T for values in (evidence, lengths)]
        assert draws.info["rhat"][prompt] == pytest.approx(max(float(rhat(c)) for c in chains))
        sizes = [float(effective_sample_size(c)) for c in chains]
        assert draws.info["effective_sample_size"][prompt] == pytest.approx(min(sizes))
    proposed = draws.info["proposals_by_cut"]
    assert sum(proposed) == 3 * 3 * 45  # prompts, chains, steps
    assert proposed[0] > proposed[1] > proposed[2] > 0  # all completions have a first token
    by_cut = sum(n * rate for n, rate in zip(proposed, draws.info["acceptance_by_cut"], strict=True))
    assert by_cut == pytest.approx(45 * 3 * sum(draws.info["acceptance"]))
    # the later the cut, the less changes
    assert draws.info["acceptance_by_cut"][2] > draws.info["acceptance_by_cut"][0]
    assert len(set(map(tuple, draws.completion_ids))) > 5


def lasting(completions, completion_ids, **kwargs):
    """One completion of each first word has 30 nats more than any other, so a chain that has found it stays."""
    return [30.0 if ids[:1] == ids[1:2] else 0.0 for ids in completion_ids]


def test_chains_that_disagree_are_unconverged(toy):
    posterior, _ = short(toy)
    fine = MetropolisHastings(num_chains=4, burn_in=30, thin=4).sample(posterior, toy.prompts, 160, seeded())
    assert fine.guarantee == "consistent"
    sampler = MetropolisHastings(num_chains=4, burn_in=2)
    stuck = sampler.sample(prior_of(toy).tilt(lasting, 1.0).tilt(short_reward, 0.02), toy.prompts, 160, seeded())
    assert max(value for value in stuck.info["rhat"] if value is not None) > 1.5
    assert stuck.guarantee == "unconverged"
    assert expectation(stuck, [1.0] * len(stuck)).mean.tolist() == pytest.approx([1.0] * 3)


@pytest.mark.slow
def test_conditions_are_kept_and_their_evidence_says_nothing(toy):
    posterior = prior_of(toy).condition(few_a)
    log_p, log_z = conditioned(toy)
    draws = MetropolisHastings("independence", num_chains=300, burn_in=5, max_start_draws=2000).sample(
        posterior, toy.prompts, 300, seeded()
    )
    assert_draws_follow(toy, draws, log_p)
    assert ((draws.log_z.low < log_z) & (log_z < draws.log_z.high)).all()
    chains = MetropolisHastings(num_chains=2, burn_in=5).sample(posterior, toy.prompts, 20, seeded())
    assert all(few_a(chains.completions))
    assert all(agreement is not None for agreement in chains.info["rhat"])  # of the lengths
    few = MetropolisHastings(num_chains=4, burn_in=0).sample(posterior, toy.prompts, 7, seeded())
    assert few.counts.tolist() == [7, 7, 7]
    assert few.info["rhat"] == few.info["effective_sample_size"] == [None] * 3
    with pytest.raises(ValueError, match=r"same length .* 7 rows of 4 chains"):
        expectation(few, [1.0] * 21)


@pytest.mark.parametrize("kernel", ["suffix", "independence"])
def test_seeds_and_columns(toy, kernel):
    def starts_with(completions, word, **kwargs):
        return [str(completion).startswith(w) for completion, w in zip(completions, word, strict=True)]

    posterior, columns = prior_of(toy).condition(starts_with), {"word": ["a", "b", "a"]}
    sampler = MetropolisHastings(kernel, num_chains=2, burn_in=30)
    first, again, other = (sampler.sample(posterior, toy.prompts, 8, seeded(s), columns) for s in (0, 0, 1))
    assert first.completion_ids == again.completion_ids != other.completion_ids
    assert [text[0] for text in first.texts] == ["a"] * 8 + ["b"] * 8 + ["a"] * 8
    assert (counts_of(toy, first).sum(-1) == 8).all()


def rarely(completions, **kwargs):
    return ["b" in completion for completion in completions]


def never(completions, **kwargs):
    return [False] * len(completions)


def test_nowhere_to_start(toy):
    with pytest.raises(ValueError, match=r"None of 20 completions drawn is allowed"):
        MetropolisHastings(max_start_draws=20).sample(prior_of(toy).condition(never), toy.prompts, 4, seeded())
    sampler = MetropolisHastings("independence", num_chains=4, max_start_draws=40)
    with pytest.raises(ValueError, match=r"too few were among 40 draws, for \d of 3 prompts.*`max_start_draws`"):
        sampler.sample(prior_of(toy).condition(rarely), toy.prompts, 4, seeded())


class Another:
    def sample(self, prompts, n=1, generator=None):
        raise NotImplementedError

    def log_prob(self, prompts, completion_ids):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernel": "gibbs"}, ValueError, '`kernel` must be "suffix" or "independence"'),
        ({"proposal": Another()}, TypeError, 'Use `kernel="independence"`'),
        ({"num_chains": 0}, ValueError, "`num_chains` must be an integer of at least 1"),
        ({"burn_in": -1}, ValueError, "`burn_in` must be an integer of at least 0"),
        ({"thin": 0}, ValueError, "`thin` must be"),
        ({"max_start_draws": 0}, ValueError, "`max_start_draws` must be"),
    ],
)
def test_options_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        MetropolisHastings(**arguments)
