"""A critic that was fitted in closed form: what its numbers mean, and how it is read back."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.lm import Critic, FittedCritic
from rlhf_bayes.lm.fitted_critic import prefix_states


def test_the_coefficients_are_those_of_the_formula():
    # b, h_1, h_2, paid, t, t², r, t·r
    critic = FittedCritic(torch.tensor([0.5, 2.0, -1.0, 0.3, 0.1, 0.01, 4.0, -0.2], dtype=torch.float64), 2)
    hidden, paid, time = torch.tensor([[1.0, 3.0]]), torch.tensor([-2.0]), torch.tensor([5])
    expected = 0.5 + 2 * 1 - 3 + 0.3 * -2 + 0.1 * 5 + 0.01 * 25 + 4 * 0.7 - 0.2 * 5 * 0.7
    assert_close(critic.forecast(hidden, paid, time, torch.tensor([0.7])), torch.tensor([expected]))
    assert critic.reads_rewards
    with pytest.raises(ValueError, match="`prefix_rewards` must be given"):
        critic.forecast(hidden, paid, time)


def test_it_is_read_back_and_is_no_value_head(tmp_path):
    critic = FittedCritic(torch.randn(1 + 3 + 3, dtype=torch.float64), 3)
    critic.save_pretrained(tmp_path / "fitted")
    read = FittedCritic.from_pretrained(tmp_path / "fitted")
    assert torch.equal(read.coefficients, critic.coefficients)
    assert (read.hidden_size, read.reads_rewards) == (3, False)
    with pytest.raises(ValueError, match=r"got one in .* that was fitted in closed form"):
        Critic.from_pretrained(tmp_path / "fitted")
    Critic(3).save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="must hold a critic that was fitted in closed form, got a shared one"):
        FittedCritic.from_pretrained(tmp_path / "head")


def test_large_states_are_projected_alike_each_time():
    hidden = torch.randn(5, 1024)
    states = prefix_states(hidden)
    assert states.shape == (5, 512)
    assert torch.equal(states, prefix_states(hidden))
    assert not FittedCritic(torch.zeros(1 + 512 + 3), 1024).reads_rewards
    assert FittedCritic(torch.zeros(1 + 512 + 5), 1024).reads_rewards
