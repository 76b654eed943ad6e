"""Estimates from draws against a policy and a posterior that are enumerated."""

import io
import math

import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

from rlhf_bayes.diagnostics import (
    Draws,
    Estimate,
    LogZEstimate,
    PosteriorFit,
    distinct_2,
    draw,
    estimate_log_z,
    fit_table,
    plot_history,
    posterior_fit,
)
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.testing import toy_reward

BETA = 1.0


def language_model(toy, model):
    return LanguageModel(model, toy.tokenizer, toy.max_completion_length, batch_size=512)


@pytest.fixture(scope="module")
def setting(large_toy):
    prior = language_model(large_toy, large_toy.model)
    policy = language_model(large_toy, large_toy.random_policy(noise=0.1, seed=4))
    posterior = prior.tilt(toy_reward, BETA)
    generator = torch.Generator().manual_seed(0)
    from_prior = draw(prior, policy, posterior, large_toy.prompts, 800, generator)
    from_policy = draw(policy, policy, posterior, large_toy.prompts, 800, generator)
    return large_toy, policy, from_prior, from_policy


def near(estimate: Estimate, expected: float):
    off = (estimate.mean - expected) / estimate.standard_error
    assert abs(off) < 4, f"off by {off:.1f} standard errors"


@pytest.mark.parametrize("with_policy", [False, True])
def test_log_z_is_that_of_the_enumeration(setting, with_policy):
    toy, _, from_prior, from_policy = setting
    estimate = estimate_log_z(from_prior, from_policy if with_policy else None)
    assert estimate.trustworthy.all()
    assert estimate.num_draws == (1600 if with_policy else 800)
    assert estimate.standard_error.max() < 0.15
    off = (estimate.log_z - toy.log_z(toy.rewards / BETA)) / estimate.standard_error  # (P,)
    assert off.abs().max() < 4, f"off by {off.tolist()} standard errors"


def test_fit_is_that_of_the_enumeration(setting):
    toy, policy, from_prior, from_policy = setting
    fit = posterior_fit(from_policy, estimate_log_z(from_prior, from_policy), BETA)
    log_p = toy.log_probs(policy.model).detach()  # (P, N)
    p = log_p.exp()
    near(fit.reward, (p * toy.rewards).sum(-1).mean().item())
    assert from_policy.kl.min() >= 0
    assert from_policy.kl.var() < (from_policy.log_policy - from_policy.log_prior).var()
    near(fit.kl_to_prior, (p * (log_p - toy.log_prior)).sum(-1).mean().item())
    near(fit.elbo, toy.elbo(policy.model, toy.rewards / BETA).mean().item())
    near(fit.entropy, -(p * log_p).sum(-1).mean().item())
    exact_gap = toy.reverse_kl(policy.model, toy.rewards / BETA).mean().item()
    assert exact_gap > 0.3
    near(fit.gap, exact_gap)


def test_the_prior_itself_has_no_kl_to_itself(setting):
    toy, _, from_prior, _ = setting
    fit = posterior_fit(from_prior.as_untrained(), estimate_log_z(from_prior), BETA)
    assert fit.kl_to_prior == Estimate(0.0, 0.0)
    near(fit.gap, toy.reverse_kl(toy.model, toy.rewards / BETA).mean().item())


def test_balance_heuristic_survives_a_policy_that_misses_the_posterior():
    # two completions, one of them unknown to the policy; draws in their exact proportions
    log_prior = torch.tensor([0.75, 0.25]).log()
    log_policy = torch.tensor([1 - 1e-12, 1e-12], dtype=torch.float64).log().float()
    evidence = torch.tensor([0.0, 2.0])

    def rows(which):
        return Draws(
            [["x"] * len(which)], *(column[which][None] for column in (log_policy, log_prior, evidence, evidence))
        )

    estimate = estimate_log_z(rows(torch.tensor([0] * 75 + [1] * 25)), rows(torch.zeros(100, dtype=torch.long)))
    assert_close(estimate.log_z, torch.tensor([math.log(0.75 + 0.25 * math.exp(2.0))]), rtol=0, atol=1e-5)


def test_too_few_or_too_unequal_weights_are_not_trusted():
    torch.manual_seed(0)
    flat, wild = torch.zeros(1, 100), torch.randn(1, 100) * 8
    few = torch.zeros(1, 12)
    for evidence, expected in ((flat, True), (wild, False), (few, False)):
        none = torch.zeros_like(evidence)
        draws = Draws([["a"] * evidence.size(1)], none, none, evidence, none)
        assert estimate_log_z(draws).trustworthy.tolist() == [expected]


def test_one_prompt_without_trust_takes_it_from_the_mean(setting):
    _, _, from_prior, from_policy = setting
    estimate = estimate_log_z(from_prior)
    spoilt = LogZEstimate(
        estimate.log_z, estimate.standard_error, estimate.importance_ess, torch.tensor([0.1, 0.9, 0.1]), 800
    )
    fit = posterior_fit(from_policy, spoilt, BETA)
    assert str(fit.log_z) == str(fit.gap) == "not trustworthy"
    assert fit.elbo.trustworthy


def test_without_a_posterior_the_rest_is_said(setting):
    _, _, _, from_policy = setting
    fit = posterior_fit(from_policy, None, BETA)
    assert fit.elbo is fit.log_z is fit.gap is None
    near(fit.reward, from_policy.log_likelihood.mean().item())
    console = Console(file=io.StringIO(), width=120)
    console.print(fit_table({"policy": fit}))
    assert console.file.getvalue().count("–") >= 3


def test_reward_functions_get_the_columns_of_their_prompt(toy):
    def named_length(completions, lengths, **columns):
        return [float(length) for length in lengths]

    prior = language_model(toy, toy.model)
    posterior = prior.tilt(named_length, 0.5)
    draws = draw(prior, prior, posterior, toy.prompts, 2, columns={"lengths": [1, 2, 5]})
    assert draws.log_likelihood.tolist() == [[2.0, 2.0], [4.0, 4.0], [10.0, 10.0]]


def test_distinct_2():
    assert distinct_2(["a b c", "a b"]) == pytest.approx(2 / 3)
    assert distinct_2(["", "word"]) == 0.0


def test_table_and_curves(tmp_path):
    good, bad = Estimate(1.234, 0.05), Estimate(7.0, 3.0, trustworthy=False)
    fit = PosteriorFit(good, good, good, bad, bad, good, 0.5)
    console = Console(file=io.StringIO(), width=120)
    console.print(fit_table({"prior": fit, "policy": fit}))
    text = console.file.getvalue()
    assert "1.23 ± 0.05" in text
    assert "7.0" not in text
    assert text.count("not trustworthy") == 4
    history = [{"step": step, "reward": 0.1 * step, "posterior/elbo": step - 3.0} for step in (1, 2, 3)]
    for name, log_z in (("a.png", good), ("b.png", bad), ("c.png", None)):
        plot_history(history, log_z, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
