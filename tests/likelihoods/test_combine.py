"""Several rewards made one: against arithmetic by hand, and against TRL's own lines."""

import math

import pytest
import torch

from rlhf_bayes.likelihoods import combine_rewards

NAN, INF = math.nan, math.inf


def test_weighted_sum_clip_and_penalty_by_hand():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 3.0], [-4.0, NAN], [NAN, NAN], [-INF, 5.0]])
    weights = torch.tensor([0.5, 2.0])
    expected = torch.tensor([4.5, 6.0, -2.0, NAN, -INF])
    torch.testing.assert_close(combine_rewards(rewards, weights), expected, equal_nan=True)

    clipped = combine_rewards(rewards, weights, clip_range=(-1.0, 5.0))
    torch.testing.assert_close(clipped, torch.tensor([4.5, 5.0, -1.0, NAN, -INF]), equal_nan=True)

    # the penalty comes after the clip: a completion that did not end may fall below the range
    ended = torch.tensor([True, False, False, False, False])
    penalised = combine_rewards(rewards, weights, (-1.0, 5.0), missing_eos_penalty=3.0, ended=ended)
    torch.testing.assert_close(penalised, torch.tensor([4.5, 2.0, -4.0, NAN, -INF]), equal_nan=True)


def test_agrees_with_the_lines_of_trl():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(64, 3, generator=generator)
    rewards[torch.rand(64, 3, generator=generator) < 0.5] = NAN
    weights = torch.tensor([1.0, -0.3, 2.0])
    expected = (rewards * weights.unsqueeze(0)).nansum(dim=1)
    expected[rewards.isnan().all(dim=1)] = NAN
    expected = expected.clamp(min=-0.7, max=1.1)
    assert expected.isnan().any(), "the comparison must meet every case"
    assert (expected == 1.1).any()
    assert (expected == -0.7).any()
    torch.testing.assert_close(combine_rewards(rewards, weights, (-0.7, 1.1)), expected, equal_nan=True)


def test_a_function_of_weight_zero_cannot_forbid():
    combined = combine_rewards(torch.tensor([[-INF, 2.0], [-INF, NAN]]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(combined, torch.tensor([2.0, 0.0]))


def test_is_fp32_and_leaves_its_input_alone():
    rewards = torch.tensor([[1, 2]], dtype=torch.float64)
    combined = combine_rewards(rewards, torch.ones(2, dtype=torch.float64), (0.0, 1.0), 2.0, torch.tensor([False]))
    assert combined.dtype is torch.float32
    assert combined.tolist() == [-1.0]
    assert rewards.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("weights", [torch.ones(3), torch.ones(1), torch.ones(2, 1)])
def test_weights_must_match_the_functions(weights):
    with pytest.raises(ValueError, match="`weights` must hold one weight"):
        combine_rewards(torch.ones(5, 2), weights)


def test_the_penalty_needs_to_know_what_ended():
    with pytest.raises(ValueError, match=r"`ended`.*got None"):
        combine_rewards(torch.ones(5, 2), torch.ones(2), missing_eos_penalty=1.0)
    with pytest.raises(ValueError, match=r"`ended`.*\(5,\).*got \(4,\)"):
        combine_rewards(torch.ones(5, 2), torch.ones(2), None, 1.0, ended=torch.ones(4, dtype=torch.bool))
