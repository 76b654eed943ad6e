"""Pooled draws of two distributions: what the fitted mixture is worth, on distributions that are enumerated."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.testing import assert_close

from rlhf_bayes.numerics import log_z
from rlhf_bayes.numerics.mixture import log_balance, log_fitted_mixture

# skewed, and of different shapes; the density is in neither's direction
P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.1, 0.1, 0.2, 0.6], dtype=torch.float64)
DENSITY = torch.tensor([0.2, 1.1, 3.0, 4.0], dtype=torch.float64)


def pooled(n_p, n_q, repeats=1, seed=0):
    """Indices of draws: (repeats, n_p + n_q)."""
    generator = torch.Generator().manual_seed(seed)
    draws = [
        torch.multinomial(probs.expand(repeats, -1), n, replacement=True, generator=generator)
        for probs, n in ((P, n_p), (Q, n_q))
    ]
    return torch.cat(draws, dim=1)


def test_the_share_makes_the_draws_most_likely():
    index = pooled(60, 30)[0]
    log_mixture = log_fitted_mixture(P.log()[index], Q.log()[index], 2 / 3)
    found = minimize_scalar(
        lambda omega: -float((omega * P[index] + (1 - omega) * Q[index]).log().sum()),
        bounds=(0.1, 0.9),
        method="bounded",
        options={"xatol": 1e-10},
    )
    expected = (found.x * P[index] + (1 - found.x) * Q[index]).log()
    assert_close(log_mixture, expected, rtol=0, atol=1e-6)
    # the stationary point of the likelihood: both sum to 1 over the pooled draws
    for probs in (P, Q):
        assert_close((probs[index] / log_mixture.exp()).mean(), torch.tensor(1.0).double(), rtol=0, atol=1e-6)


def test_a_mixture_of_both_has_no_variance():
    index = pooled(40, 40, repeats=50)
    for weight in (0.0, 0.3, 1.0):
        target = 7.0 * (weight * P + (1 - weight) * Q)
        log_weights = target.log()[index] - log_fitted_mixture(P.log()[index], Q.log()[index], 0.5)
        assert_close(log_z(log_weights), torch.full((50,), math.log(7.0)).double(), rtol=0, atol=1e-6)


def test_better_than_the_balance_heuristic_and_unbiased_to_first_order():
    n, repeats = 100, 4000
    index = pooled(n, n, repeats)
    log_half = (0.5 * (P + Q)).log()[index]
    fitted = log_fitted_mixture(P.log()[index], Q.log()[index], 0.5)
    z = [(DENSITY.log()[index] - mixture).exp().mean(-1) for mixture in (log_half, fitted)]
    truth, error = DENSITY.sum(), z[1].std() / math.sqrt(repeats)
    assert z[1].std() < 0.8 * z[0].std()
    assert (z[1].mean() - truth).abs() < 4 * error + truth / (2 * n)  # its bias is of order 1/n


def test_equal_distributions_and_missing_support():
    log_p = P.log()[pooled(5, 5)[0]]
    assert_close(log_fitted_mixture(log_p, log_p, 0.5), log_p)
    # q misses what p draws: the weight of such a draw stays bounded
    log_q = torch.tensor([0.0, -torch.inf]).double()
    log_mixture = log_fitted_mixture(torch.tensor([0.9, 0.1]).double().log(), log_q, 0.5)
    assert log_mixture[1] >= math.log(0.1 * 0.05) - 1e-9


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, math.nan])
def test_shares_of_nothing(share):
    with pytest.raises(ValueError, match="`share` must be between 0 and 1"):
        log_fitted_mixture(P.log(), Q.log(), share)


def test_other_draws():
    with pytest.raises(ValueError, match=r"must have the same shape, got \(4,\) and \(3,\)"):
        log_fitted_mixture(P.log(), Q.log()[:3], 0.5)


def test_the_balance_of_three_proposals():
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    found = log_balance(torch.stack([P, Q, uniform]).log(), [5, 2, 13])
    assert_close(found.exp(), 0.25 * P + 0.1 * Q + 0.65 * uniform)
    nowhere = torch.stack([P.log(), torch.tensor([0.0, *[-torch.inf] * 3]).double()])
    assert_close(log_balance(nowhere, [1, 1]).exp(), 0.5 * P + torch.tensor([0.5, 0, 0, 0]).double())
    for counts in ([1], [1, 0, 1]):
        with pytest.raises(ValueError, match="a positive number for each"):
            log_balance(torch.stack([P, Q, uniform]).log(), counts)
