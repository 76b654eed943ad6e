"""Gain and bias: the moments they give, and the rewards they refuse."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.rewards import Normalization, RewardModel


def test_each_member_gets_mean_0_and_standard_deviation_1():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(3, 50, generator=generator) * torch.tensor([[0.01], [1.0], [300.0]]) + 7
    normalization = Normalization.fit(raw, "draws")
    rewards = normalization.apply(raw)
    assert_close(rewards.mean(-1), torch.zeros(3), rtol=0, atol=1e-4)
    assert_close((rewards**2).mean(-1), torch.ones(3), rtol=1e-3, atol=0)
    # other completions get the same map, in which the order of two does not change
    first, second = normalization.apply(torch.tensor([[7.0, 7.01], [0.0, 1.0], [5.0, 4.0]])).unbind(-1)
    assert (second > first).tolist() == [True, True, False]
    member = normalization.member(2)
    assert_close(member.apply(raw[2:]), rewards[2:])
    assert member.reference == "draws"


def test_by_hand():
    normalization = Normalization.fit(torch.tensor([[1.0, 3.0]]), "two")
    assert normalization == Normalization((1.0,), (-2.0,), "two")
    assert Normalization(**normalization.to_dict()) == normalization


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (torch.ones(2, 1), r"at least 2 completions, \(K, N\), got shape \(2, 1\)"),
        (torch.ones(4), r"got shape \(4,\)"),
        (torch.tensor([[1.0, 2.0], [3.0, 3.0]]), "member 1 gave 3 to all 2"),
        (torch.tensor([[1e4, 1e4 + 0.001]]), "member 0 gave 10000 to all 2"),
        (torch.tensor([[1.0, 2.0], [3.0, math.nan]]), "got nan for member 1 and completion 1"),
        (torch.tensor([[math.inf, 2.0]]), "got inf for member 0 and completion 0"),
    ],
)
def test_what_has_no_moments_is_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        Normalization.fit(rewards, "draws")


@pytest.mark.parametrize("gain", [(0.0,), (-1.0,), (math.inf,), (math.nan,), (), (1.0, 2.0)])
def test_a_map_that_turns_preferences_round_is_refused(gain):
    with pytest.raises(ValueError, match=r"`gain`.*Fit them again"):
        Normalization(gain, (0.0,), "draws")


def test_another_number_of_members_is_refused():
    with pytest.raises(ValueError, match=r"K = 1 members as the normalization, got \(2, 3\)"):
        Normalization((1.0,), (0.0,), "draws").apply(torch.ones(2, 3))


def test_a_reward_model_keeps_its_normalization_on_disk(llama, llama_tokenizer, tmp_path):
    prompts, completions = ["ab", "c", "fade"], ["cd", "a", "deaf"]
    reward = RewardModel(llama, llama_tokenizer)
    raw = torch.tensor(reward(prompts, completions), dtype=torch.float64)
    reward.normalize(prompts, completions, reference="three texts")
    reward.save_pretrained(tmp_path)
    expected = (raw - raw.mean()) / raw.std(correction=0)
    for one in (reward, RewardModel(tmp_path)):
        assert_close(torch.tensor(one(prompts, completions)), expected.float(), rtol=1e-4, atol=1e-5)
        assert one.normalization.reference == "three texts"
    assert reward.member_rewards(prompts, completions).shape == (reward.num_members, 3)
    # fitted again, from the raw reward
    reward.normalize(prompts, completions)
    assert_close(torch.tensor(reward(prompts, completions)), expected.float(), rtol=1e-4, atol=1e-5)
