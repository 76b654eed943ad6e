"""Reward as evidence: arithmetic by hand, and arguments out of range."""

import math

import numpy as np
import pytest
import torch

from rlhf_bayes.likelihoods import Likelihood, RewardLikelihood

EOS = 9
PROMPTS = ["p", "pp", "p", "ppp"]
COMPLETIONS = ["a", "bb", "ccc", "dddd"]
IDS = [[1, EOS], [2, 2], [3, 3, EOS], [EOS]]


def length(completions, **kwargs):
    return [len(completion) for completion in completions]


def answer_only(prompts, answer, **kwargs):
    return [None if a is None else a - len(prompt) for prompt, a in zip(prompts, answer, strict=True)]


def log_likelihood(likelihood, columns=None):
    return likelihood.log_likelihood(PROMPTS, COMPLETIONS, IDS, columns)


def test_is_reward_over_beta():
    likelihood = RewardLikelihood(length, beta=0.25)
    assert isinstance(likelihood, Likelihood)
    assert likelihood.beta == 0.25
    assert likelihood.reward_names == ["length"]
    result = log_likelihood(likelihood)
    assert result.dtype is torch.float32
    assert result.tolist() == [4.0, 8.0, 12.0, 16.0]


def test_everything_that_moves_the_optimum_at_once():
    likelihood = RewardLikelihood(
        [length, answer_only],
        beta=0.5,
        reward_weights=[1, -2],
        reward_clip_range=(0.0, 3.0),
        missing_eos_penalty=1.5,
        eos_token_ids=[EOS, 8],
    )
    columns = {"answer": [None, 4, 2, 0]}
    # lengths 1 2 3 4, answers None 2 1 -3: sums 1 -2 1 10, clipped to 0 .. 3; the second one did not end
    by_hand = [1.0, 0.0 - 1.5, 1.0, 3.0]
    assert likelihood.rewards(PROMPTS, COMPLETIONS, IDS, columns).tolist() == by_hand
    assert log_likelihood(likelihood, columns).tolist() == [reward / 0.5 for reward in by_hand]


def test_an_empty_completion_did_not_end():
    likelihood = RewardLikelihood(length, 1.0, missing_eos_penalty=2.0, eos_token_ids=[EOS])
    assert likelihood.log_likelihood(["p"], [""], [[]]).tolist() == [-2.0]


def test_forbidden_stays_forbidden():
    def no_b(completions, **kwargs):
        return [-math.inf if "b" in completion else None for completion in completions]

    for clip_range in (None, (0.0, 2.0)):
        result = log_likelihood(RewardLikelihood([length, no_b], 1.0, reward_clip_range=clip_range))
        assert (result == -math.inf).tolist() == [False, True, False, False]


def test_no_evidence_must_be_said():
    def sometimes(completions, **kwargs):
        return [None if len(completion) > 2 else 1.0 for completion in completions]

    message = r"sometimes\) returned None for 2 of 4, the first in row 2: prompt 'p', completion 'ccc'\. Return 0"
    with pytest.raises(ValueError, match=message):
        log_likelihood(RewardLikelihood(sometimes, 1.0))

    def always(completions, **kwargs):
        return [0] * len(completions)

    assert log_likelihood(RewardLikelihood([sometimes, always], 1.0)).tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("beta", [2, 0.1, np.float32(0.5), 1e-8])
def test_beta_may_be_any_positive_number(beta):
    assert RewardLikelihood(length, beta).beta == float(beta)


@pytest.mark.parametrize(
    ("beta", "error", "message"),
    [
        (0, ValueError, r"got 0: .*argmax.*`PPOConfig\(beta=0\)`"),
        (0.0, ValueError, "argmax"),
        (-0.1, ValueError, "positive and finite, got -0.1"),
        (math.nan, ValueError, "positive and finite, got nan"),
        (math.inf, ValueError, "positive and finite, got inf"),
        ("0.1", TypeError, "got '0.1' of type str"),
        (None, TypeError, "got None of type NoneType"),
        (True, TypeError, "got True of type bool"),
    ],
)
def test_beta_out_of_range(beta, error, message):
    with pytest.raises(error, match="`beta` must be a?.*" + message):
        RewardLikelihood(length, beta)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reward_weights": [1.0, 2.0]}, ValueError, "each of the 1 reward functions, got 2"),
        ({"reward_weights": []}, ValueError, "each of the 1 reward functions, got 0"),
        ({"reward_weights": [math.nan]}, ValueError, r"`reward_weights` must be finite, got \[nan\]"),
        ({"reward_weights": 0.5}, TypeError, r"got 0.5. Pass `\[0.5\]`"),
        ({"reward_clip_range": (1.0, -1.0)}, ValueError, r"low < high, got \(1.0, -1.0\)"),
        ({"reward_clip_range": (math.nan, 1.0)}, ValueError, "low < high"),
        ({"reward_clip_range": (0.0, 1.0, 2.0)}, ValueError, "two numbers"),
        ({"missing_eos_penalty": -1.0, "eos_token_ids": [EOS]}, ValueError, "not negative, got -1.0"),
        ({"missing_eos_penalty": math.inf, "eos_token_ids": [EOS]}, ValueError, "finite and not negative, got inf"),
        ({"missing_eos_penalty": 1.0}, ValueError, "`eos_token_ids` must hold.*got None"),
        ({"missing_eos_penalty": 1.0, "eos_token_ids": []}, ValueError, "`eos_token_ids` must hold"),
    ],
)
def test_other_arguments_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        RewardLikelihood(length, 1.0, **arguments)


def test_a_clipped_reward_has_a_bound():
    def reward(completions, **kwargs):
        return [float(len(text)) for text in completions]

    def likelihood(clip_range):
        return RewardLikelihood(reward, beta=0.3, reward_clip_range=clip_range)

    assert likelihood(None).bound is None
    assert likelihood((-1.0, math.inf)).bound is None
    clipped = likelihood((-1.0, 0.7))
    # reached, and not exceeded by rounding
    assert clipped.log_likelihood(["p", "p"], ["", "abc"], [[1], [1]]).max().item() == clipped.bound
    assert clipped.bound == pytest.approx(0.7 / 0.3)
