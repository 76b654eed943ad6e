"""Estimates against enumeration: values, and how often their intervals hold the truth."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import binom

from rlhf_bayes.diagnostics import Estimate, LogZEstimate, ScoredDraws, posterior_fits
from rlhf_bayes.diagnostics.over_prompts import explanation, over_prompts

from .enumerated import Population

REPEATS = 200


@pytest.fixture(scope="module")
def population(toy):
    return Population.of(toy, toy.random_policy(noise=0.1, seed=4), longest=6)


@pytest.fixture(scope="module")
def coverage(population):
    """Shares of repeats in which 95% intervals held the truth, and how far means were off: by quantity."""
    generator = torch.Generator().manual_seed(0)
    truths = population.truths()
    found = {}
    for _ in range(REPEATS):
        rows = torch.randint(len(population.prompts), (16,), generator=generator)
        for who, fit, truth in zip(("prior", "policy"), population.fits(rows, 64, generator), truths, strict=True):
            for name, values in truth.items():
                estimate = getattr(fit, name)
                everywhere, here = values.mean().item(), values[rows].mean().item()
                inside = (
                    estimate.low - 1e-9 <= everywhere <= estimate.high + 1e-9,
                    abs(estimate.mean - here) <= 1.96 * estimate.draws_standard_error + 1e-9,
                    estimate.mean - here,
                )
                found.setdefault((who, name), []).append(inside)
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}


@pytest.mark.slow
def test_intervals_hold_the_mean_over_all_prompts(coverage):
    # 95%, less what 16 skewed prompts take from Student's interval
    enough = binom.ppf(0.0005, REPEATS, 0.92) / REPEATS
    for key, found in coverage.items():
        assert found[:, 0].mean() >= enough, f"{key}: {found[:, 0].mean():.3f}, less than {enough:.3f}"


def test_errors_of_the_draws_are_those_for_these_prompts(coverage):
    low, high = (binom.ppf(q, REPEATS, p) / REPEATS for q, p in ((0.0005, 0.92), (0.9995, 0.97)))
    for key, found in coverage.items():
        if key != ("prior", "kl_to_prior"):  # always 0, with no error
            assert low <= found[:, 1].mean() <= high, f"{key}: {found[:, 1].mean():.3f}, not {low:.3f} to {high:.3f}"


def test_no_estimate_is_biased(coverage):
    for key, found in coverage.items():
        off, error = found[:, 2].mean(), found[:, 2].std() / math.sqrt(REPEATS)
        assert off.abs() <= 4 * error, f"{key}: off by {off / error:.1f} standard errors"
        # and what is left is small beside the error of one estimate
        assert off.abs() <= 0.25 * found[:, 2].std() + 1e-12


def test_at_the_posterior_nothing_is_left_and_nothing_is_noise(population):
    log_posterior = (population.log_prior + population.log_likelihood).log_softmax(-1)
    there = Population(
        population.toy, population.prompts, population.log_prior, log_posterior, population.log_likelihood
    )
    _, fit = there.fits(torch.arange(20), 100, torch.Generator().manual_seed(0))
    for name in ("gap", "forward_kl", "jeffreys", "tv"):
        assert getattr(fit, name).mean == pytest.approx(0.0, abs=1e-5)
        assert getattr(fit, name).draws_standard_error < 1e-4
    log_z = (population.log_prior + population.log_likelihood).logsumexp(-1)[:20].mean().item()
    assert fit.elbo.mean == pytest.approx(log_z, abs=1e-5)
    assert fit.log_z.mean == pytest.approx(log_z, abs=1e-5)
    assert fit.reward.mean < fit.posterior_reward.mean + 4 * fit.reward.draws_standard_error


def scored(log_prob, log_prior, evidence, text="x y"):
    """Draws of one prompt with these numbers."""
    n = len(evidence)
    columns = [torch.tensor([column], dtype=torch.float64) for column in (log_prob, log_prior, evidence)]
    kl, entropy = columns[0] - columns[1], -columns[0]
    return ScoredDraws(["p"], [[[0, 1]] * n], [[text] * n], *columns, kl, entropy)


def test_forbidden_completions_make_the_gap_infinite_and_only_that():
    # two completions, the second forbidden; prior and policy half and half
    half = [math.log(0.5)] * 40
    draws = scored(half, half, [0.0] * 20 + [-math.inf] * 20)
    _, fit, log_z = posterior_fits(draws, draws, draws.log_prob, None)
    assert fit.forbidden.mean == 0.5
    assert str(fit.gap) == "∞"
    assert str(fit.elbo) == "−∞"
    assert fit.reward is None
    assert log_z.log_z.item() == pytest.approx(math.log(0.5))
    assert fit.forward_kl.mean == pytest.approx(math.log(2))
    assert fit.tv.mean == pytest.approx(0.5)
    assert fit.as_dict()["gap"]["mean"] is None


def test_no_support_among_the_draws_is_said():
    half = [math.log(0.5)] * 40
    draws = scored(half, half, [-math.inf] * 40)
    _, fit, log_z = posterior_fits(draws, draws, draws.log_prob, 1.0)
    assert str(fit.log_z) == str(fit.forward_kl) == str(fit.tv) == "not trustworthy"  # nor is a bound known
    assert fit.entropy.mean == pytest.approx(math.log(2))
    assert "For 1 prompts, no draw is possible under the posterior" in str(log_z)


def test_a_policy_that_misses_the_posterior_does_no_harm():
    # three completions, of which the policy knows the first
    prior, policy, evidence = (
        torch.tensor(x).double() for x in ([0.5, 0.3, 0.2], [1 - 2e-12, 1e-12, 1e-12], [0, 1, 2])
    )
    index = torch.multinomial(prior, 100, replacement=True, generator=torch.Generator().manual_seed(0))
    first = torch.zeros(100, dtype=torch.long)

    def rows(which, source):
        return scored(*(column[which].tolist() for column in (source.log(), prior.log(), evidence)))

    _, fit, log_z = posterior_fits(rows(index, prior), rows(first, policy), policy.log()[index][None], 1.0)
    truth = (prior * evidence.exp()).sum().log()
    assert abs(log_z.log_z - truth) < 4 * log_z.standard_error
    assert log_z.standard_error < 0.1
    assert fit.forward_kl.mean > 10  # what is missing is seen


def test_trust_needs_draws_that_count_and_a_tail_that_is_light():
    def trusted(ess, khat, n):
        return LogZEstimate(torch.zeros(2), torch.ones(2), torch.tensor([80.0, ess]), khat, n).trustworthy

    assert trusted(50.0, 0.2, 100)
    assert not trusted(9.0, 0.2, 100)
    assert not trusted(50.0, 0.9, 100)
    assert trusted(50.0, 0.55, 100)  # the threshold is that of 200 draws
    assert trusted(50.0, math.inf, 100)  # ties: no tail to judge
    assert not trusted(24.0, math.inf, 24)


def test_the_tail_is_that_of_all_prompts_whatever_their_normalisers():
    generator = torch.Generator().manual_seed(0)

    def estimate(shape):
        weights = torch.rand(50, 100, generator=generator, dtype=torch.float64) ** -shape  # Pareto
        return LogZEstimate.of(weights.log() + 30 * torch.randn(50, 1, generator=generator), *torch.zeros(2, 50))

    assert estimate(0.3).khat == pytest.approx(0.3, abs=0.15)
    assert estimate(0.3).trustworthy
    heavy = estimate(0.9)
    assert heavy.khat > 0.6
    assert not heavy.trustworthy


def test_weights_of_few_values_have_no_tail_to_judge():
    # a reward of steps: the largest of three values is rare, and would pass for a heavy tail
    log_weights = torch.tensor([0.0] * 150 + [0.2] * 40 + [2.0] * 10).double()[None]
    estimate = LogZEstimate.of(log_weights, torch.zeros(1), torch.zeros(1))
    assert estimate.khat == math.inf
    assert estimate.trustworthy
    assert "no k-hat, for weights that tie" in str(estimate)


def test_one_prompt_without_trust_takes_it_from_the_mean():
    generator = torch.Generator().manual_seed(0)
    fine, wild = torch.zeros(1, 100), 8 * torch.randn(1, 100, generator=generator)
    zeros = torch.zeros(2, 100)
    ids, texts = [[[0]] * 100] * 2, [["x"] * 100] * 2
    for evidence, expected in ((torch.cat([fine, fine]), True), (torch.cat([fine, wild]), False)):
        draws = ScoredDraws(["p", "q"], ids, texts, zeros, zeros, evidence, zeros, zeros)
        _, fit, log_z = posterior_fits(draws, draws, zeros, 1.0)
        assert log_z.enough_draws.tolist() == [True, expected]
        for name in ("log_z", "gap", "forward_kl", "jeffreys", "tv", "posterior_reward", "posterior_kl_to_prior"):
            assert getattr(fit, name).trustworthy == expected
        assert fit.elbo.trustworthy
        assert fit.reward.trustworthy


def test_bounds_hold_where_log_z_cannot_be_trusted(population):
    """Of 300 evaluations with 6 draws, at least 95% have bounds below the truth; and bounds are not empty."""
    generator, repeats = torch.Generator().manual_seed(1), 300
    held, sizes = {}, []
    for _ in range(repeats):
        rows = torch.randint(len(population.prompts), (4,), generator=generator)
        prior, policy = population.fits(rows, 6, generator)
        assert not prior.gap.trustworthy
        for who, fit, truth in zip(("prior", "policy"), (prior, policy), population.truths(), strict=True):
            for name in ("log_z", "gap", "jeffreys", "posterior_reward"):
                bound = getattr(fit, name).at_least
                assert str(getattr(fit, name)) == f"≥ {bound:.2f}".replace("-", "−")
                held.setdefault((who, name), []).append(bound <= truth[name][rows].mean().item())
        sizes.append(policy.gap.at_least)
        assert policy.forward_kl.at_least is policy.tv.at_least is None
    enough = binom.ppf(0.0005, repeats, 0.95) / repeats
    for key, hits in held.items():
        assert sum(hits) / repeats >= enough, f"{key}: {sum(hits) / repeats:.3f}"
    truth = population.truths()[1]["gap"].mean().item()
    assert sum(sizes) / repeats > 0.1 * truth  # a bound of 0 would hold as well


def test_few_prompts_get_an_interval_and_one_prompt_no_error_that_is_not_known():
    two = over_prompts(torch.tensor([1.7, 2.7]), torch.tensor([0.01, 0.01]))
    assert str(two) == "2.20 [−4.15, 8.55]"  # Student's t with one degree of freedom: 12.7 standard errors
    assert str(over_prompts(torch.tensor([1.7, 2.7]), support=(0.0, math.inf))) == "2.20 [0.00, 8.55]"
    five = over_prompts(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert str(five) == "3.00 ± 0.71"
    one = over_prompts(torch.tensor([0.25]))
    assert str(one) == "0.25"  # and not ± nan
    assert explanation([one]) == " One prompt says nothing of other prompts."
    assert str(over_prompts(torch.tensor([2.0]), torch.tensor([0.04]))) == "2.00 ± 0.20"
    assert explanation([five]) == "± standard error over prompts."
    assert "two to four prompts" in explanation([two])


def test_a_share_has_the_interval_of_a_proportion():
    none = over_prompts(torch.zeros(3), torch.zeros(3), support=(0.0, 1.0), share_of=16)
    assert str(none) == "0.000 [0.000, 0.074]"  # 0 of 48: scipy.stats.binomtest(0, 48)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 48))
    rare = over_prompts(torch.tensor([0.0, 0.0, 0.0, 0.0, 1 / 16]), share_of=16)
    assert 0 <= rare.low < 1 / 80 < rare.high


def test_one_prompt_is_not_called_trustworthy():
    def said(prompts):
        return str(LogZEstimate(torch.zeros(prompts), torch.ones(prompts), torch.full((prompts,), 80.0), 0.2, 100))

    assert "known for this prompt, and says nothing of others" in said(1)
    assert "trustworthy" not in said(1)
    assert "is trustworthy" in said(3)


def test_advice_fits_what_was_asked():
    few = LogZEstimate(torch.zeros(2), torch.ones(2), torch.full((2,), 3.0), 0.9, 100)
    assert "(raise β)" in str(few)
    assert "β" not in str(replace(few, has_beta=False))


def test_intervals_by_hand():
    estimate = over_prompts(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.1, 0.1, 0.25]))
    assert estimate.mean == pytest.approx(3.0)
    assert estimate.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert estimate.high - 3.0 == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)  # Student's t, 2 degrees
    assert estimate.draws_standard_error == pytest.approx(math.sqrt(0.45) / 3)
    alone = over_prompts(torch.tensor([2.0]), torch.tensor([0.04]))
    assert alone.standard_error == alone.draws_standard_error == pytest.approx(0.2)
    assert alone.high - 2.0 == pytest.approx(2.093024 * 0.2, rel=1e-6)  # 19 degrees: the jackknife's groups


def test_numbers_print_with_the_digits_that_they_have():
    assert str(Estimate(1.234, 0.05, 1.1, 1.3, 0.01)) == "1.23 ± 0.05"
    assert str(Estimate(0.8123, 0.004, 0.8, 0.82, 0.01)) == "0.812 ± 0.004"
    assert str(Estimate(7.0, 3.0, 1.0, 13.0, 1.0, trustworthy=False)) == "not trustworthy"
