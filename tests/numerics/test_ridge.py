"""Ridge regression from sums: against least squares on augmented data, and against the mean."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics.ridge import RegressionSums, ridge_fits, with_constant


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.4, 0.0], [0.0, 3.0, 0.2], [0.0, 0.0, 0.05]])
    features = torch.randn(200, 3, generator=generator) @ mixing + torch.tensor([5.0, -2.0, 0.3])
    noise = torch.randn(200, generator=generator)
    targets = 2.0 + features @ torch.tensor([1.0, -0.5, 8.0]) + noise
    weights = 0.1 + torch.rand(200, generator=generator)
    return features, targets, weights


@pytest.mark.parametrize("penalty", [1e-3, 0.5, 20.0])
def test_it_is_least_squares_with_rows_that_pull_slopes_to_zero(data, penalty):
    features, targets, weights = (x.double().numpy() for x in data)
    mean = np.average(features, axis=0, weights=weights)
    scale = np.average((features - mean) ** 2, axis=0, weights=weights) ** 0.5
    root = np.sqrt(weights)[:, None]
    standardised = np.hstack([np.ones((200, 1)), (features - mean) / scale])
    pulls = np.sqrt(penalty * weights.sum()) * np.eye(4)[1:]
    rows, answers = np.vstack([root * standardised, pulls]), np.concatenate([root[:, 0] * targets, np.zeros(3)])
    slopes = np.linalg.lstsq(rows, answers, rcond=None)[0]
    expected = np.concatenate([[slopes[0] - (slopes[1:] / scale) @ mean], slopes[1:] / scale])
    fits = ridge_fits(RegressionSums.of(*data), torch.tensor([7.0, penalty]))
    assert_close(fits[1], torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_an_infinite_penalty_forecasts_the_mean(data):
    features, targets, weights = data
    (fit,) = ridge_fits(RegressionSums.of(*data), torch.tensor([torch.inf]))
    mean = (weights * targets).sum() / weights.sum()
    assert_close(with_constant(features).double() @ fit, mean.double().expand(200), rtol=1e-5, atol=1e-5)


def test_sums_of_parts_are_sums_of_the_whole(data):
    parts = [RegressionSums.of(*(x[rows] for x in data)) for rows in (slice(50), slice(50, 200))]
    penalties = torch.tensor([1e-2])
    whole = ridge_fits(RegressionSums.of(*data), penalties)
    assert_close(ridge_fits(parts[0].plus(parts[1]), penalties), whole, rtol=1e-6, atol=1e-6)
    # what decays counts as if its weights were smaller
    features, targets, weights = data
    faded = torch.cat([0.25 * weights[:50], weights[50:]])
    expected = ridge_fits(RegressionSums.of(features, targets, faded), penalties)
    assert_close(ridge_fits(parts[0].plus(parts[1], decay=0.25), penalties), expected, rtol=1e-6, atol=1e-6)


def test_a_feature_that_never_varies_has_no_slope(data):
    features, targets, weights = data
    stuck = torch.cat([features, torch.full((200, 1), 3.7)], dim=1)
    with_stuck, without = (
        ridge_fits(RegressionSums.of(x, targets, weights), torch.tensor([1e-2])) for x in (stuck, features)
    )
    assert with_stuck[0, -1] == 0
    assert_close(with_stuck[:, :-1], without, rtol=1e-6, atol=1e-6)


def test_a_large_mean_does_not_drown_what_varies(data):
    features, targets, weights = data
    shifted = features.double() + torch.tensor([0.0, 1e4, 0.0])
    fits = [ridge_fits(RegressionSums.of(x, targets, weights), torch.tensor([1e-2])) for x in (features, shifted)]
    assert_close(fits[0][:, 1:], fits[1][:, 1:], rtol=1e-4, atol=1e-4)
