"""`posterior.sample`: which sampler draws, that its draws follow the posterior, and what it warns of."""

import pytest

from rlhf_bayes.posterior import tilt
from rlhf_bayes.testing import toy_reward

from .enumerated import assert_draws_follow, conditioned, few_a, prior_of, seeded, tilted


def test_a_known_bound_gives_exact_draws(toy):
    posterior = prior_of(toy).condition(few_a)
    draws = posterior.sample(toy.prompts, 400, seeded())
    assert (draws.guarantee, draws.info["sampler"]) == ("exact", "rejection")
    assert draws.counts.tolist() == [400, 400, 400]
    assert_draws_follow(toy, draws, conditioned(toy)[0])


def test_otherwise_draws_are_resampled(toy):
    draws = tilted(toy).sample(toy.prompts, 200, seeded())
    assert (draws.guarantee, draws.info["sampler"], draws.log_weights) == ("consistent", "importance", None)
    assert draws.info["candidates"] == 3200
    assert_draws_follow(toy, draws, toy.log_posterior())


def test_one_draw_of_each_prompt_is_the_default(toy):
    draws = prior_of(toy).condition(few_a).sample(toy.prompts, generator=seeded())
    assert draws.counts.tolist() == [1, 1, 1]


def test_too_few_candidates_are_told(toy):
    def rare(completions, **columns):
        return [100.0 * (text == "a b a") for text in completions]

    with pytest.warns(UserWarning, match="For 3 of 3 prompts the draws cannot be trusted.*256 candidates .ESS ≥ "):
        prior_of(toy).tilt(rare, 1.0).sample(toy.prompts, 2, seeded())


def test_a_bound_that_rejects_nearly_all_is_told(toy):
    posterior = tilt(prior_of(toy), toy_reward, 1.0, reward_clip_range=(-9.0, 12.0))
    with pytest.warns(
        UserWarning, match=r"3 of 3 prompts have fewer than 50 draws, .*of 10,000 completions of the prior"
    ):
        draws = posterior.sample(toy.prompts, 50, seeded())
    assert draws.guarantee == "exact"
    assert int(draws.counts.max()) < 50
