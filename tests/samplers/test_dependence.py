"""The standard error of a mean, by how rows depend on each other, against formulas written out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from rlhf_bayes.samplers import (
    ChainRows,
    Draws,
    IndependentRows,
    ParticleRows,
    ResampledRows,
    expectation,
)
from rlhf_bayes.samplers.dependence import Dependence

VALUES = [1.0, 4.0, 2.0, 7.0]
WEIGHTS = [0.1, 0.2, 0.3, 0.4]


def draws(dependence, log_weights=None, info=None):
    ids, prompts = [[1]] * 4, ["a"] * 4
    index = torch.zeros(4, dtype=torch.long)
    return Draws(prompts, index, ids, ["b"] * 4, ["b"] * 4, log_weights, "consistent", 1, dependence, None, info or {})


def error_of(dependence, weighted=False, info=None):
    log_weights = torch.tensor(WEIGHTS, dtype=torch.float64).log() if weighted else None
    return expectation(draws(dependence, log_weights, info), VALUES).standard_error.item()


def independent_by_hand():
    mean = sum(w * f for w, f in zip(WEIGHTS, VALUES, strict=True))
    return math.sqrt(sum(w**2 * (f - mean) ** 2 for w, f in zip(WEIGHTS, VALUES, strict=True)))


def resampled_by_hand(shares):
    deviations = [f - 3.5 for f in VALUES]
    return math.sqrt(sum((share + 1 / 4) * d**2 for share, d in zip(shares, deviations, strict=True)) / 4)


def particles_by_hand():
    """Rows 0 and 1 share an ancestor, one resampling, all counting for 3 particles."""
    mean = sum(w * f for w, f in zip(WEIGHTS, VALUES, strict=True))
    parts = [w * (f - mean) for w, f in zip(WEIGHTS, VALUES, strict=True)]
    families = [(parts[0] + parts[1], 0.3), (parts[2], 0.3), (parts[3], 0.4)]
    jackknife = (4 / 3) ** 2 * sum((sum_ / (1 - weight)) ** 2 for sum_, weight in families)
    floor = sum(w * (f - mean) ** 2 for w, f in zip(WEIGHTS, VALUES, strict=True)) / 3
    return math.sqrt(max(jackknife, floor))


SHARES = torch.tensor([0.05, 0.1, 0.2, 0.15], dtype=torch.float64)
PARTICLES = ParticleRows(torch.tensor([0, 0, 2, 3]), torch.tensor([1]), torch.tensor([3.0]))
# class -> (rows, whether they are weighted, the error by hand; None where another test has it)
BY_HAND = {
    IndependentRows: (IndependentRows(), True, independent_by_hand()),
    ResampledRows: (ResampledRows(SHARES), False, resampled_by_hand(SHARES.tolist())),
    ParticleRows: (PARTICLES, True, particles_by_hand()),
    ChainRows: (ChainRows(1), False, None),  # test_metropolis_hastings.py, over many runs
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_the_error_is_the_formula(kind):
    rows, weighted, expected = BY_HAND[kind]
    assert isinstance(rows, Dependence)
    found = error_of(rows, weighted)
    assert found > 0
    assert expected is None or found == pytest.approx(expected, rel=1e-9)


def test_chains_of_different_lengths_have_none():
    with pytest.raises(ValueError, match=r"same length for a standard error, got 4 rows of 3 chains"):
        error_of(ChainRows(3))


@pytest.mark.parametrize("kind", [IndependentRows, ResampledRows, ParticleRows])
def test_info_is_for_reading_only(kind):
    rows, weighted, _ = BY_HAND[kind]
    guessed = {"chains": 2, "candidate_weights": [1.0] * 4, "ancestor": [0] * 4}
    assert error_of(rows, weighted, guessed) == error_of(rows, weighted)


@pytest.mark.parametrize("nothing", [None, "independent"])
def test_there_is_no_default(nothing):
    with pytest.raises(TypeError, match=r"`draws\.dependence` must say how the rows depend .*IndependentRows\(\)"):
        expectation(replace(draws(IndependentRows()), dependence=nothing), VALUES)
    with pytest.raises(TypeError, match="dependence"):
        Draws([], torch.zeros(0), [], [], [], None, "exact", 1)
