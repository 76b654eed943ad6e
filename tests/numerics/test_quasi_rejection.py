"""Quasi-rejection: the published figure, enumeration, draws; the wanted distance; what is refused."""

import math

import pytest
import torch
from scipy.stats import poisson
from torch.testing import assert_close

from rlhf_bayes import numerics
from rlhf_bayes.numerics import quasi_rejection_curve

COUNTS = torch.arange(120)
LOG_Q, LOG_P = (torch.tensor(poisson.logpmf(COUNTS, mean)) for mean in (10, 11))


def test_the_published_figure():
    """
    Eikema et al. 2022, arXiv 2112.05702, Poisson(10) to Poisson(11) at β = 0.5, 1, 2: acceptance .999, .877, .5,
    TV .12, .075, .0041, KL .046, .021, 0. The exact sums differ from them in the last digit: .9995, .877, .498,
    .123, .0749, .0035 and .0481, .0199, .0005.
    """
    curve = quasi_rejection_curve(LOG_P - LOG_Q, torch.tensor([0.5, 1, 2]).log(), LOG_Q)
    assert_close(curve.acceptance, torch.tensor([0.999, 0.877, 0.5]).double(), atol=0.002, rtol=0)
    assert_close(curve.tv, torch.tensor([0.12, 0.075, 0.0041]).double(), atol=0.003, rtol=0)
    assert_close(curve.kl, torch.tensor([0.046, 0.021, 0.0]).double(), atol=0.0025, rtol=0)


def test_it_is_the_distance_of_the_capped_distribution():
    generator = torch.Generator().manual_seed(0)
    log_q = torch.randn(3, 50, generator=generator).double().log_softmax(-1)
    log_weights = 2 * torch.randn(3, 50, generator=generator).double() - 1
    log_weights[:, ::7] = -math.inf
    bounds = torch.tensor([-math.inf, -3.0, 0.5, 20.0]).double()
    curve = quasi_rejection_curve(log_weights, bounds, log_q)
    log_p = (log_q + log_weights).log_softmax(-1)
    assert_close(curve.log_z, (log_q + log_weights).logsumexp(-1))
    for k, log_bound in enumerate(bounds):
        if log_bound == -math.inf:  # each that is allowed is kept
            kept = log_q.masked_fill(log_weights == -math.inf, -math.inf)
        else:
            kept = log_q + (log_weights - log_bound).clamp(max=0)
        log_p_bound = kept.log_softmax(-1)
        assert_close(curve.acceptance[:, k], kept.logsumexp(-1).exp())
        assert_close(curve.tv[:, k], numerics.tv(log_p, log_p_bound))
        assert_close(curve.kl[:, k], numerics.forward_kl(log_p, log_p_bound))
    assert (curve.kl[:, -1] < 1e-12).all()
    assert (curve.acceptance.diff(dim=-1) <= 0).all()


def test_from_draws():
    """From 20,000 draws of Poisson(10): the exact curve, within 2 %."""
    draws = torch.tensor(poisson.rvs(10, size=20_000, random_state=0))
    bounds = torch.tensor([0.5, 1, 1.5]).log()
    curve = quasi_rejection_curve((LOG_P - LOG_Q)[draws], bounds)
    exact = quasi_rejection_curve(LOG_P - LOG_Q, bounds, LOG_Q)
    assert_close(curve.acceptance, exact.acceptance, atol=0, rtol=0.02)
    assert_close(curve.tv, exact.tv, atol=0.001, rtol=0.02)
    assert_close(curve.kl, exact.kl, atol=0.001, rtol=0.03)


def test_the_smallest_bound_for_a_wanted_distance():
    weights = torch.tensor(poisson.rvs(10, size=(2, 4000), random_state=1))
    curve = quasi_rejection_curve((LOG_P - LOG_Q)[weights])
    assert curve.tv.shape == (2, 101)
    chosen = curve.log_bound_for(0.05)
    at, below = (quasi_rejection_curve((LOG_P - LOG_Q)[weights], (chosen - less)[:, None]).tv for less in (0, 0.2))
    assert (at <= 0.05).all()
    assert (below > 0.05).all()
    # no bound is above the largest weight, which is exact on these draws
    assert_close(curve.log_bound_for(0.0), (LOG_P - LOG_Q)[weights].max(-1).values)


def test_what_is_refused():
    with pytest.raises(ValueError, match="N > 0"):
        quasi_rejection_curve(torch.zeros(0))
    with pytest.raises(ValueError, match=r"got nan or \+inf"):
        quasi_rejection_curve(torch.tensor([0.0, math.nan]))
    curve = quasi_rejection_curve(torch.tensor([0.0, 3.0]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"`max_tv` = 0.01 is not reached .* Add larger bounds"):
        curve.log_bound_for(0.01)
    with pytest.raises(ValueError, match="below 1, got 1"):
        curve.log_bound_for(1.0)
    nothing = quasi_rejection_curve(torch.full((4,), -math.inf), torch.tensor([0.0]))
    assert nothing.acceptance.item() == 0
    assert nothing.tv.isnan().all()
