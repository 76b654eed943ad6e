"""Verdicts on numbers that must give each of the three, with quantiles from tables."""

import math
import statistics

import pytest

from rlhf_bayes.numerics.verdicts import Measured, measured, verdict, verdict_of_all


@pytest.mark.parametrize(
    ("mean", "standard_error", "expected"),
    [
        (1.0, 0.5, "agrees"),  # 1 − 1.96 · 0.5 = 0.02
        (1.0, 0.52, "cannot tell"),  # 1 − 1.96 · 0.52 = −0.02
        (-1.0, 0.52, "cannot tell"),
        (-1.0, 0.5, "disagrees"),
        (0.0, 0.0, "disagrees"),  # not above 0
        (1e-9, 0.0, "agrees"),
        (-1e-9, 0.0, "disagrees"),
        (math.nan, 0.1, "cannot tell"),
        (3.0, math.nan, "cannot tell"),
    ],
)
def test_a_statement_on_the_sign(mean, standard_error, expected):
    assert verdict(Measured(mean, standard_error), low=0.0) == expected


@pytest.mark.parametrize(
    ("mean", "standard_error", "expected"),
    [
        (0.01, 0.01, "agrees"),  # up to 0.0296
        (0.01, 0.02, "cannot tell"),  # contains 0, but also 0.049: this does not show equality
        (0.01, 1.0, "cannot tell"),
        (0.05, 0.01, "disagrees"),  # from 0.0304
    ],
)
def test_equality_needs_an_interval_between_the_bounds(mean, standard_error, expected):
    assert verdict(Measured(mean, standard_error), low=-0.03, high=0.03) == expected
    assert verdict(Measured(-mean, standard_error), low=-0.03, high=0.03) == expected


def test_few_seeds_widen_the_interval():
    values = [0.5, 1.0, 1.8]
    quantity = measured(values)
    assert quantity.mean == pytest.approx(1.1)
    assert quantity.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(3))
    half = 4.302653 * quantity.standard_error  # Student's t with 2 degrees of freedom, from a table
    assert quantity.interval == pytest.approx((1.1 - half, 1.1 + half))
    assert verdict(quantity, low=0.0) == "cannot tell"
    assert verdict(Measured(quantity.mean, quantity.standard_error), low=0.0) == "agrees"


def test_one_seed_tells_nothing():
    assert verdict(measured([5.0]), low=0.0) == "cannot tell"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["agrees", "agrees"], "agrees"),
        (["agrees", "cannot tell"], "cannot tell"),
        (["agrees", "cannot tell", "disagrees"], "disagrees"),
        ([], "cannot tell"),
    ],
)
def test_a_claim_of_several_statements(verdicts, expected):
    assert verdict_of_all(verdicts) == expected


def test_refuses_bounds_between_which_all_or_nothing_lies():
    for low, high in ((1.0, 0.0), (-math.inf, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="must be below"):
            verdict(Measured(0.0, 1.0), low, high)
    with pytest.raises(ValueError, match="at least one number"):
        measured([])
