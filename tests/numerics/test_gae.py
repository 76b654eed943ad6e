import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics import gae

LENGTHS = [5, 1, 3, 0]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]  # (4, 5)


@pytest.fixture
def rewards_and_values():
    rewards, values = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    return torch.where(MASK, rewards, torch.nan), torch.where(MASK, values, -torch.inf)


def weighted_sum_of_residuals(rewards, values, length, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, by a double loop over one completion."""
    advantages = []
    for t in range(length):
        advantage = 0.0
        for step in range(length - t):
            s = t + step
            next_value = values[s + 1] if s + 1 < length else 0.0
            advantage += (gamma * lam) ** step * (rewards[s] + gamma * next_value - values[s])
        advantages.append(advantage)
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.97, 1.0), (0.0, 0.5)])
def test_matches_the_double_loop(rewards_and_values, gamma, lam):
    rewards, values = rewards_and_values
    advantages, returns = gae(rewards, values, MASK, gamma=gamma, lam=lam)
    for row, length in enumerate(LENGTHS):
        expected = weighted_sum_of_residuals(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        assert_close(advantages[row, :length], torch.tensor(expected, dtype=torch.float64))
        assert_close(returns[row, :length], advantages[row, :length] + values[row, :length])
        assert (advantages[row, length:] == 0).all()
        assert (returns[row, length:] == 0).all()


def test_lambda_one_is_the_return_to_go_minus_the_value(rewards_and_values):
    rewards, values = rewards_and_values
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    to_go = torch.where(MASK, rewards, 0.0).flip(-1).cumsum(-1).flip(-1)
    assert_close(returns, torch.where(MASK, to_go, 0.0))
    assert_close(advantages, torch.where(MASK, to_go - values, 0.0))


def test_lambda_zero_is_the_one_step_residual(rewards_and_values):
    rewards, values = rewards_and_values
    advantages, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.0)
    assert_close(advantages[0, 4], rewards[0, 4] - values[0, 4])
    assert_close(advantages[2, 1], rewards[2, 1] + 0.9 * values[2, 2] - values[2, 1])
    assert_close(returns[2, 1], rewards[2, 1] + 0.9 * values[2, 2])


def test_padding_does_not_matter(rewards_and_values):
    rewards, values = rewards_and_values
    padded = gae(rewards[2:3], values[2:3], MASK[2:3])
    trimmed = gae(rewards[2:3, :3], values[2:3, :3], MASK[2:3, :3])
    assert_close(padded[0][:, :3], trimmed[0])
    assert_close(padded[1][:, :3], trimmed[1])


def test_refusals(rewards_and_values):
    rewards, values = rewards_and_values
    with pytest.raises(ValueError, match=r"`gamma` must be in \[0, 1\], got 1.5"):
        gae(rewards, values, MASK, gamma=1.5)
    with pytest.raises(ValueError, match=r"`lam` must be in \[0, 1\], got -0.1"):
        gae(rewards, values, MASK, lam=-0.1)
    with pytest.raises(ValueError, match="right-padded, got a valid token after padding in row 2"):
        gae(rewards, values, torch.where(torch.arange(4)[:, None] == 2, MASK.flip(-1), MASK))
    with pytest.raises(ValueError, match="must have the shape"):
        gae(rewards, values[:, :4], MASK)
