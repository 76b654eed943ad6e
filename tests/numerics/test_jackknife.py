"""Bias and variance of statistics whose true ones are known."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics.jackknife import jackknife


def test_the_mean_keeps_its_value_and_gets_its_variance():
    values = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).double()
    estimate, variance = jackknife(lambda kept: values[:, kept[0]].mean(-1), [20])
    assert_close(estimate, values.mean(-1))
    assert_close(variance, values.var(-1) / 20)  # groups of one: the textbook formula


def test_two_samples_add_their_variances():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2000, 40, generator=generator), 3 * torch.randn(2000, 20, generator=generator)
    _, variance = jackknife(lambda kept: first[:, kept[0]].mean(-1) - second[:, kept[1]].mean(-1), [40, 20])
    expected = 1 / 40 + 9 / 20
    # relative spread of one estimate is √(2/19)
    assert abs(variance.mean() / expected - 1) < 4 * math.sqrt(2 / 19 / 2000)


def test_the_bias_of_a_logarithm_is_removed():
    draws = torch.empty(5000, 20, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(2))
    plain = draws.mean(-1).log()
    corrected, _ = jackknife(lambda kept: draws[:, kept[0]].mean(-1).log(), [20])
    error = plain.std().item() / math.sqrt(5000)
    assert plain.mean().item() < -4 * error  # about −1/40
    assert abs(corrected.mean().item()) < 4 * error


def test_what_is_not_finite_is_not_corrected():
    values = torch.tensor([[-torch.inf, *[0.0] * 9], [1.0] * 10])
    estimate, variance = jackknife(lambda kept: values[:, kept[0]].mean(-1), [10])
    assert estimate.tolist() == [-torch.inf, 1.0]
    assert variance.isnan().tolist() == [True, False]


def test_one_draw_cannot_be_left_out():
    with pytest.raises(ValueError, match=r"must be at least 2, got \[5, 1\]"):
        jackknife(lambda kept: torch.zeros(()), [5, 1])
