"""Exact intervals of a probability: scipy's, and coverage by enumeration of all ways in which trials may end."""

import math

import pytest
from scipy.stats import binom, binomtest

from rlhf_bayes.numerics import clopper_pearson


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
