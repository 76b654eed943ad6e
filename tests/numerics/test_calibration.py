"""Calibration: against a loop over pairs, and against predictions whose calibration is known."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics import brier_score, expected_calibration_error
from rlhf_bayes.numerics.calibration import reliability_bins


def drawn_pairs(num_pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(num_pairs, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 5, (num_pairs,), generator=generator) / 4
    return prob, target


def test_bins_against_a_loop():
    prob, target = drawn_pairs(300, seed=0)
    bins = reliability_bins(prob, target, num_bins=4)
    members = [[] for _ in range(4)]
    for p, t in zip(prob.tolist(), target.tolist(), strict=True):
        confidence, accuracy = (p, t) if p > 0.5 else (1 - p, 1 - t)
        members[min(int((confidence - 0.5) / 0.125), 3)].append((confidence, accuracy))
    gaps = 0.0
    for index, pairs in enumerate(members):
        confidence, accuracy = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        assert bins.confidence[index].item() == pytest.approx(confidence)
        assert bins.accuracy[index].item() == pytest.approx(accuracy)
        assert bins.weight[index].item() == pytest.approx(len(pairs) / 300)
        gaps += len(pairs) / 300 * abs(confidence - accuracy)
    assert expected_calibration_error(prob, target, num_bins=4) == pytest.approx(gaps)


def test_which_text_is_called_chosen_does_not_matter():
    prob, target = drawn_pairs(300, seed=1)
    swapped = torch.rand(300, generator=torch.Generator().manual_seed(2)) < 0.5
    other = torch.where(swapped, 1 - prob, prob), torch.where(swapped, 1 - target, target)
    for ours, theirs in zip(reliability_bins(prob, target), reliability_bins(*other), strict=True):
        assert_close(ours, theirs, equal_nan=True)
    assert brier_score(prob, target) == pytest.approx(brier_score(*other))


def test_empty_bins_are_nan_and_cost_nothing():
    prob, target = torch.tensor([0.98, 0.03, 1.0, 0.5]), torch.tensor([1.0, 0.0, 0.5, 1.0])
    bins = reliability_bins(prob, target)
    assert bins.weight.tolist() == [0.25] + [0.0] * 8 + [0.75]
    assert bins.accuracy.isnan().tolist() == [False] + [True] * 8 + [False]
    # a toss-up predicts neither side
    assert bins.accuracy[0] == 0.5
    expected = 0.75 * ((0.98 + 0.97 + 1.0) / 3 - 2.5 / 3)
    assert expected_calibration_error(prob, target) == pytest.approx(expected, abs=1e-6)


def test_calibrated_and_overconfident_predictions():
    generator = torch.Generator().manual_seed(3)
    prob = torch.rand(50_000, generator=generator)
    target = (torch.rand(50_000, generator=generator) < prob).float()
    bins = reliability_bins(prob, target)
    standard_error = (bins.confidence * (1 - bins.confidence) / (bins.weight * 50_000)).sqrt()
    assert ((bins.accuracy - bins.confidence).abs() < 4 * standard_error).all()
    # always .9 sure, and right three times of four
    prob = torch.where(torch.arange(400) % 2 == 0, 0.9, 0.1)
    target = torch.where(torch.arange(400) % 8 < 6, prob.round(), 1 - prob.round())
    assert expected_calibration_error(prob, target) == pytest.approx(0.15, abs=1e-6)


def test_brier_score_of_shares_and_of_votes():
    prob, share = torch.tensor([0.7, 0.2]), torch.tensor([0.75, 0.5])
    assert brier_score(prob, share) == pytest.approx((0.05**2 + 0.3**2) / 2)
    votes = torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 0])
    per_vote = brier_score(prob.repeat_interleave(4), votes)
    assert per_vote - brier_score(prob, share) == pytest.approx((share * (1 - share)).mean().item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: brier_score(torch.ones(3), torch.ones(2)), r"must both be \(N,\) with N > 0, got \(3,\) and \(2,\)"),
        (lambda: brier_score(torch.ones(0), torch.ones(0)), "N > 0"),
        (lambda: reliability_bins(torch.ones(1, 3), torch.ones(1, 3)), r"got \(1, 3\)"),
        (lambda: reliability_bins(torch.tensor([2.0]), torch.ones(1)), r"`prob` must be in \[0, 1\], got 2"),
        (lambda: reliability_bins(torch.ones(1), torch.tensor([math.nan])), r"`target` must be in \[0, 1\], got nan"),
        (lambda: reliability_bins(torch.ones(1), torch.ones(1), num_bins=0), "`num_bins` must be at least 1, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
