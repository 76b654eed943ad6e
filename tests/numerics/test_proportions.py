"""Exact intervals of a probability: scipy's, and coverage by enumeration of all ways in which trials may end."""

import math
import random

import pytest
from scipy.stats import binom, binomtest

from rlhf_bayes.numerics import clopper_pearson, clustered_proportion


@pytest.mark.parametrize(("k", "n"), [(0, 12), (3, 12), (12, 12), (1, 1)])
def test_fixed_number_of_trials(k, n):
    expected = binomtest(k, n).proportion_ci(0.9, method="exact")
    assert clopper_pearson(k, n, 0.9) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("p", [0.03, 0.2, 0.21, 0.5, 0.8, 0.97])
def test_coverage_where_the_third_success_or_a_budget_ends_the_trials(p):
    wanted, budget = 3, 20
    covered, below, above = 0.0, 0.0, 0.0
    ends = [(k, budget, False, binom.pmf(k, budget, p)) for k in range(wanted)]
    ends += [(wanted, n, True, p * binom.pmf(wanted - 1, n - 1, p)) for n in range(wanted, budget + 1)]
    assert math.isclose(sum(probability for *_, probability in ends), 1)
    for k, n, stopped, probability in ends:
        low, high = clopper_pearson(k, n, 0.9, stopped_at_success=stopped)
        below, above = below + probability * (high < p), above + probability * (low > p)
        covered += probability * (low <= p <= high)
    assert covered >= 0.9
    assert max(below, above) <= 0.05


def test_what_cannot_be():
    with pytest.raises(ValueError, match="got 3 of 2"):
        clopper_pearson(3, 2)
    with pytest.raises(ValueError, match="1 where the last trial succeeded"):
        clopper_pearson(0, 2, stopped_at_success=True)
    with pytest.raises(ValueError, match="`confidence`"):
        clopper_pearson(1, 2, 1.0)


@pytest.mark.parametrize("draws", [16, 48])
def test_nothing_among_all_trials_is_no_certainty(draws):
    # all clusters alike: scipy's interval of that many trials
    expected = binomtest(0, 3 * draws).proportion_ci(method="exact")
    assert clustered_proportion([0.0] * 3, draws) == pytest.approx((expected.low, expected.high))
    assert clustered_proportion([1.0] * 3, draws) == pytest.approx((1 - expected.high, 1.0))
    one = binomtest(5, draws).proportion_ci(method="exact")
    assert clustered_proportion([5 / draws], draws) == pytest.approx((one.low, one.high))


@pytest.mark.parametrize("clusters", [3, 12])
def test_clusters_that_differ_are_covered(clusters):
    """Shares of clusters are Beta(1, 9), so draws of one cluster are correlated."""
    rng, draws, repeats = random.Random(0), 32, 2000
    covered = naive = 0
    for _ in range(repeats):
        shares = []
        for _ in range(clusters):
            p = rng.betavariate(1, 9)
            shares.append(sum(rng.random() < p for _ in range(draws)) / draws)
        low, high = clustered_proportion(shares, draws)
        assert 0 <= low < high <= 1
        covered += low <= 0.1 <= high
        low, high = clopper_pearson(round(sum(shares) * draws), clusters * draws)
        naive += low <= 0.1 <= high
    assert covered / repeats > 0.93
    assert naive / repeats < 0.85  # without clusters the interval is too short


def test_shares_are_shares():
    with pytest.raises(ValueError, match=r"`shares` must be shares between 0 and 1, at least one, got \[1.2\]"):
        clustered_proportion([1.2], 5)
    with pytest.raises(ValueError, match=r"at least one, got \[\]"):
        clustered_proportion([], 5)
