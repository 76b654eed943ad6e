"""Importance sampling on an enumerated model: weights, log Z, means; the coverage of what is claimed; resampling."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics import importance_ess, khat
from rlhf_bayes.samplers import ImportanceSampler, Sampler, expectation
from rlhf_bayes.samplers.importance import systematic_resample
from rlhf_bayes.testing import toy_reward

from .enumerated import assert_within, conditioned, counts_of, few_a, policy_of, prior_of, seeded, tilted


def reward_of(draws):
    return toy_reward(draws.prompts, draws.completions, draws.completion_ids)


def exact_reward(toy):
    return (toy.log_posterior().double().exp() * toy.rewards).sum(-1)


def proposals(toy):
    return {"prior": None, "policy": policy_of(toy)}


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["prior", "policy"])
def test_means_and_log_z(toy, proposal):
    sampler: Sampler = ImportanceSampler(proposals(toy)[proposal])
    draws = sampler.sample(tilted(toy), toy.prompts, 2000, seeded())
    assert draws.counts.tolist() == [2000] * 3
    assert draws.guarantee == "consistent"
    reward = expectation(draws, reward_of(draws))
    for prompt in range(3):
        assert_within(reward.mean[prompt], reward.standard_error[prompt], exact_reward(toy)[prompt], "E[r]")
        error = (draws.log_z.high - draws.log_z.low)[prompt] / 2 / 1.96
        assert_within(draws.log_z.log_z[prompt], error, toy.log_z()[prompt], "log Z")
    assert all(draws.info["trustworthy"])
    # the distribution itself: weights of each completion against its probability
    weights = torch.zeros(3, len(toy.completion_ids), dtype=torch.float64)
    column = {tuple(ids): index for index, ids in enumerate(toy.completion_ids)}
    for prompt, ids, weight in zip(draws.prompt_index, draws.completion_ids, draws.weights, strict=True):
        weights[prompt, column[tuple(ids)]] += weight
    assert 0.5 * (weights - toy.log_posterior().exp()).abs().sum(-1).max() < 0.12


def test_weights_are_those_of_the_definition(toy):
    policy = policy_of(toy)
    draws = ImportanceSampler(policy).sample(tilted(toy), toy.prompts, 50, seeded())
    log_q = toy.log_probs(policy.model).detach()
    exact = toy.log_prior + toy.log_likelihood - log_q
    column = {tuple(ids): index for index, ids in enumerate(toy.completion_ids)}
    columns = [column[tuple(ids)] for ids in draws.completion_ids]
    expected = exact[draws.prompt_index, columns].double()
    assert_close(draws.log_weights, expected, atol=1e-4, rtol=0)
    for prompt in range(3):
        rows = draws.log_weights[draws.prompt_index == prompt]
        assert draws.info["importance_ess"][prompt] == pytest.approx(float(importance_ess(rows)))
        assert draws.info["khat"][prompt] == pytest.approx(float(khat(rows)))
        assert draws.info["max_weight"][prompt] == pytest.approx(float(rows.softmax(0).max()))


@pytest.mark.slow
def test_the_intervals_cover(toy):
    """200 runs of 150 draws: intervals of 95 % hold the truth in 90 % or more, three standard errors less."""
    draws = ImportanceSampler().sample(tilted(toy), [toy.prompts[1]] * 200, 150, seeded())
    log_z, reward = toy.log_z()[1], exact_reward(toy)[1]
    covered = ((draws.log_z.low <= log_z) & (log_z <= draws.log_z.high)).double().mean()
    estimate = expectation(draws, reward_of(draws))
    near = ((estimate.mean - reward).abs() <= 1.96 * estimate.standard_error).double().mean()
    print(f"coverage of 95 % intervals: log Z {covered:.3f}, E[r] {near:.3f}")
    assert covered > 0.9
    assert near > 0.9
    spread = estimate.mean.std()
    assert_close(estimate.standard_error.mean(), spread, atol=0, rtol=0.15)


@pytest.mark.slow
def test_resampled_draws_count_alike(toy):
    """Their means are those of the posterior, with a standard error that allows for both rounds of chance."""
    # weaker evidence than elsewhere: few draws of a skewed distribution have no normal interval, however drawn
    posterior, log_p = prior_of(toy).tilt(toy_reward, 2.0), toy.log_posterior(toy.rewards / 2.0).double()
    draws = ImportanceSampler(num_candidates=200).sample(posterior, [toy.prompts[1]] * 200, 60, seeded())
    assert (draws.log_weights, draws.counts.tolist()) == (None, [60] * 200)
    estimate, truth = expectation(draws, reward_of(draws)), (log_p[1].exp() * toy.rewards[1]).sum()
    assert_within(estimate.mean.mean(), estimate.mean.std() / math.sqrt(200), truth, "E[r]")
    # systematic resampling adds less than the independent draws for which the standard error allows
    near = ((estimate.mean - truth).abs() <= 1.96 * estimate.standard_error).double().mean()
    assert near > 0.9
    assert 0.9 < estimate.standard_error.mean() / estimate.mean.std() < 1.5
    assert max(draws.info["distinct"]) <= 60


def test_systematic_resampling_follows_the_weights():
    log_weights = torch.tensor([0.0, -math.inf, 1.0, -2.0, 0.5])
    counts = torch.stack(
        [torch.bincount(systematic_resample(log_weights, 7, seeded(seed)), minlength=5) for seed in range(2000)]
    ).double()
    expected = 7 * log_weights.double().softmax(0)
    assert (counts >= expected.floor()).all()
    assert (counts <= expected.ceil()).all()
    for mean, error, truth in zip(counts.mean(0), counts.std(0) / math.sqrt(2000), expected, strict=True):
        assert_within(mean, error + 1e-9, truth, "count")


def test_conditions_and_seeds(toy):
    posterior = prior_of(toy).condition(few_a)
    draws = ImportanceSampler().sample(posterior, toy.prompts, 500, seeded())
    log_p, log_z = conditioned(toy)
    assert ((draws.log_z.low < log_z) & (log_z < draws.log_z.high)).all()
    assert set(draws.weights[draws.weights > 0].tolist()) == set(
        (
            1
            / torch.tensor([float((draws.log_weights[draws.prompt_index == p] == 0).sum()) for p in range(3)]).double()
        ).tolist()
    )
    resampled = [
        ImportanceSampler(num_candidates=100).sample(posterior, toy.prompts, 20, seeded(s)) for s in (1, 1, 2)
    ]
    assert resampled[0].completion_ids == resampled[1].completion_ids != resampled[2].completion_ids
    assert (counts_of(toy, resampled[0])[log_p == -math.inf] == 0).all()


def test_the_tail_decides_whether_to_trust(toy, large_toy):
    far = prior_of(large_toy).tilt(toy_reward, 0.1)
    draws = ImportanceSampler().sample(far, large_toy.prompts, 100, seeded())
    assert not any(draws.info["trustworthy"])
    one = ImportanceSampler().sample(tilted(toy), toy.prompts, 1, seeded())
    assert not any(one.info["trustworthy"])
    assert (one.log_z.high == math.inf).all()


def test_prompts_without_support(toy):
    def not_for_a(prompts, **kwargs):
        return [prompt != "a" for prompt in prompts]

    posterior = prior_of(toy).condition(not_for_a)
    with pytest.warns(UserWarning, match=r"None of 30 completions drawn .* 1 of 3 prompts") as caught:
        draws = ImportanceSampler().sample(posterior, toy.prompts, 30, seeded())
    assert caught[0].filename == __file__
    assert draws.log_z.log_z[0] == -math.inf
    assert (draws.log_z.low[0], draws.log_z.high[0]) == (-math.inf, math.inf)
    assert expectation(draws, torch.ones(90)).mean.isnan().tolist() == [True, False, False]
    with pytest.warns(UserWarning, match="1 of 3 prompts"):
        resampled = ImportanceSampler(num_candidates=30).sample(posterior, toy.prompts, 5, seeded())
    assert resampled.counts.tolist() == [0, 5, 5]
    with pytest.raises(ValueError, match="for 1 of 1 prompts"):
        ImportanceSampler().sample(posterior, ["a"], 30, seeded())


def test_what_is_refused(toy):
    with pytest.raises(ValueError, match="`num_candidates` must be an integer of at least 1, got 0"):
        ImportanceSampler(num_candidates=0)
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1, got 0"):
        ImportanceSampler().sample(tilted(toy), toy.prompts, 0)
    draws = ImportanceSampler().sample(tilted(toy), toy.prompts, 4, seeded())
    with pytest.raises(ValueError, match=r"one number a row, 12, got shape \(3,\)"):
        expectation(draws, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="`values` must be finite"):
        expectation(draws, [math.nan] * 12)
    with pytest.raises(ValueError, match="must target the posterior"):
        expectation(replace(draws, guarantee="none"), [1.0] * 12)
