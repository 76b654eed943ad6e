"""The two laws of Gao et al. 2023: coefficients recovered, and what leaves them open."""

import math
import random

import pytest

from rlhf_bayes.numerics import fit_reward_law

D = [0.0, 0.3, 0.7, 1.1, 1.9, 2.4, 3.0]


@pytest.mark.parametrize(
    ("law", "reward_at"),
    [
        ("rl", lambda d: 0.3 + (d * (1.2 - 0.4 * math.log(d)) if d else 0.0)),
        ("best_of_n", lambda d: 0.3 + d * (1.2 - 0.4 * d)),
    ],
)
def test_coefficients_are_recovered(law, reward_at):
    fit = fit_reward_law(D, [reward_at(d) for d in D], law)
    assert (fit.start, fit.alpha, fit.beta) == pytest.approx((0.3, 1.2, 0.4), abs=1e-9)
    assert fit.residual == pytest.approx(0, abs=1e-9)
    assert [fit(d) for d in (0.0, 0.5, 4.0)] == pytest.approx([reward_at(d) for d in (0.0, 0.5, 4.0)])
    # the other law does not explain the same points
    other = fit_reward_law(D, [reward_at(d) for d in D], "best_of_n" if law == "rl" else "rl")
    assert other.residual > 0.01


def test_a_known_start_is_kept():
    d = [0.8 + step / 50 for step in range(10)]  # far from 0: three coefficients would be a guess
    reward = [0.1 + x * (1.2 - 0.4 * math.log(x)) + 0.02 * (-1) ** step for step, x in enumerate(d)]
    fit = fit_reward_law(d, reward, "rl", start=0.1)
    assert fit(0.0) == fit.start == 0.1
    assert (fit.alpha, fit.beta) == pytest.approx((1.2, 0.4), abs=0.15)


def test_noise_moves_the_fit_within_its_error():
    random.seed(0)
    d = [0.05 * index for index in range(1, 81)]
    reward = [x * (0.9 - 0.2 * math.log(x)) + random.gauss(0, 0.1) for x in d]
    fit = fit_reward_law(d, reward, "rl")
    # 3 numbers from 80 points: the mean squared error of the curve at them is σ²·3/80, or σ²·χ²₃/80 in one draw
    error = [fit(x) - x * (0.9 - 0.2 * math.log(x)) for x in d]
    assert sum(value**2 for value in error) < 0.1**2 * 16.3  # 99.9 %
    assert fit.residual == pytest.approx(0.1, rel=0.25)


@pytest.mark.parametrize("law", ["rl", "best_of_n"])
def test_a_reward_that_is_maximised_has_no_downturn(law):
    # best of 1 to 128 of a reward that is 1 in 3 of 10 completions and else 0: exactly 1 − 0.7ⁿ
    ns = [2**power for power in range(8)]
    d = [math.sqrt(math.log(n) - (n - 1) / n) for n in ns]
    reward = [1 - 0.7**n for n in ns]
    free = fit_reward_law(d, reward, "best_of_n")
    assert free(max(d)) < max(free(x / 100) for x in range(200))  # the parabola bends down among the points
    fit = fit_reward_law(d, reward, law, never_falls=True)
    values = [fit(x / 20) for x in range(200)]  # far beyond the points
    assert values == sorted(values)
    assert fit.residual < 0.1
    assert fit(10.0) == pytest.approx(fit(max(d)), abs=0.1)
    # constrained least squares: no curve of the family that rises up to the end is closer, on a grid
    if law == "best_of_n":

        def error(start, beta):
            return sum((start + x * (2 * max(d) * beta - beta * x) - y) ** 2 for x, y in zip(d, reward, strict=True))

        grid = [error(fit.start + i / 500, fit.beta + j / 500) for i in range(-5, 6) for j in range(-5, 6)]
        assert min(grid) == pytest.approx(error(fit.start, fit.beta), abs=1e-12)
        assert "constant from d = " in str(fit)


def test_rising_points_are_fitted_as_before():
    reward = [0.3 + d * (1.2 - 0.1 * d) for d in D]
    assert fit_reward_law(D, reward, "best_of_n", never_falls=True)[:5] == fit_reward_law(D, reward, "best_of_n")[:5]


def test_the_formula_is_legible():
    assert str(fit_reward_law(D, [-1 + d * (0.5 - 0.25 * d) for d in D], "best_of_n")) == "−1.00 + d·(0.50 − 0.25·d)"
    assert str(fit_reward_law(D, [d * (0.5 + 0.25 * d) for d in D], "best_of_n")).endswith("(0.50 + 0.25·d)")


@pytest.mark.parametrize(
    ("d", "reward"),
    [([], []), ([0, 1, 2, 3], [0, 1, 2, 3]), ([1.0] * 9, range(9)), ([0, 1, 2, 3, 4], [2.0] * 5)],
    ids=["none", "few", "one distance", "one reward"],
)
def test_too_little_to_fit(d, reward):
    assert fit_reward_law(d, list(reward), "rl") is None


@pytest.mark.parametrize(
    ("d", "reward", "law", "message"),
    [
        (D, [1.0], "rl", "one entry a point, got 7 and 1"),
        ([-0.1, *D], [0.0] * 8, "rl", "not negative"),
        ([math.nan, *D], [0.0] * 8, "rl", "must be finite"),
        (D, [math.inf] * 7, "best_of_n", "must be finite"),
        (D, D, "linear", "got 'linear'"),
    ],
)
def test_bad_input_is_refused(d, reward, law, message):
    with pytest.raises(ValueError, match=message):
        fit_reward_law(d, reward, law)
