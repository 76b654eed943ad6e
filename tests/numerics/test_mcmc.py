"""R-hat and effective sample size: ArviZ's, autoregressions whose answer is known, chains that disagree."""

import math

import pytest
import torch
from arviz_stats.base import array_stats
from scipy.stats import binom, f

from rlhf_bayes.numerics import effective_sample_size, rhat
from rlhf_bayes.numerics.mcmc import rhat_limit


def autoregression(coefficient, chains, steps, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(chains, steps, generator=generator).double() * math.sqrt(1 - coefficient**2)
    states = [torch.randn(chains, generator=generator).double()]
    for step in range(1, steps):
        states.append(coefficient * states[-1] + noise[:, step])
    return torch.stack(states, -1) + shift * torch.arange(chains).double()[:, None]


CASES = {
    "independent": autoregression(0.0, 4, 500),
    "sticky": autoregression(0.9, 4, 1001),
    "alternating": autoregression(-0.5, 3, 400),
    "apart": autoregression(0.3, 4, 300, shift=0.5),
    "ties": autoregression(0.5, 4, 300).round(),
    "one chain": autoregression(0.5, 1, 300),
    "short": autoregression(0.2, 4, 12),
}


@pytest.mark.parametrize("case", CASES)
def test_against_arviz(case):
    chains = CASES[case]
    if len(chains) > 1:  # ArviZ gives nan for one chain, though its halves can be compared
        reference = float(array_stats.rhat(chains.numpy(), method="rank"))
        assert float(rhat(chains)) == pytest.approx(reference, rel=1e-6)
    reference = float(array_stats.ess(chains.numpy(), method="mean"))
    assert float(effective_sample_size(chains)) == pytest.approx(reference, rel=0.05)


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.9])
def test_an_autoregression_is_worth_its_known_share(coefficient):
    chains = autoregression(coefficient, 8, 20_000)
    expected = (1 - coefficient) / (1 + coefficient)
    assert float(effective_sample_size(chains)) / chains.numel() == pytest.approx(expected, rel=0.1)


def test_chains_that_disagree_are_seen():
    assert float(rhat(CASES["independent"])) < 1.01
    assert float(rhat(CASES["apart"])) > 1.05
    spread = torch.cat([autoregression(0.0, 2, 300), 3 * autoregression(0.0, 2, 300, seed=1)])
    assert float(rhat(spread)) > 1.05  # equal means, different spread: the folded values tell


def test_what_cannot_be():
    assert rhat(torch.ones(2, 8)).isnan()
    assert effective_sample_size(torch.ones(2, 8)).isnan()
    for function in (rhat, effective_sample_size):
        with pytest.raises(ValueError, match="at least 4 states"):
            function(torch.zeros(2, 3))
        with pytest.raises(ValueError, match="must be finite"):
            function(torch.full((2, 4), math.inf))


@pytest.mark.parametrize(("chains", "states"), [(4, 4), (8, 8), (4, 200)])
def test_the_limit_of_rhat_is_not_reached_by_chance(chains, states):
    generator, repeats, looks = torch.Generator().manual_seed(0), 400, 2
    values = torch.randn(repeats, chains, states, generator=generator)
    exceeded = sum(float(rhat(row)) > rhat_limit(chains, states, looks) for row in values)
    assert exceeded <= binom.ppf(0.999, repeats, 0.01)
    apart = values + 3 * torch.arange(chains)[:, None]  # chains that never meet
    caught = sum(float(rhat(row)) > rhat_limit(chains, states, looks) for row in apart)
    assert caught >= (repeats if states > 4 else 0.5 * repeats)  # two states a half say little


def test_the_limit_of_rhat_for_long_chains_is_the_usual_one():
    assert rhat_limit(4, 5000) == 1.1
    # the definition, with scipy's quantile: 8 halves of 5 states
    assert rhat_limit(4, 10) == pytest.approx(math.sqrt(0.8 + f.ppf(0.99, 7, 32) / 5))
    with pytest.raises(ValueError, match="`num_states` 4, got 4 and 3"):
        rhat_limit(4, 3)
