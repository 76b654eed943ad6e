"""Means of features, and what rejection makes of a policy, against enumeration."""

import io
import math

import pytest
import torch
from rich.console import Console

from rlhf_bayes.diagnostics import Estimate, control_table, evaluate, feature_means, guarded_forward_kl, plot_control
from rlhf_bayes.likelihoods import MomentLikelihood
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.posterior import Posterior

LAMBDA = 1.3


def even(completion_ids, **columns):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def brief(completion_ids, **columns):
    return [float(len(ids) < 4 or ids[0] != 3) for ids in completion_ids]


def evaluation_of(toy, features, lambdas, n=800):
    """Of a policy against the posterior of features, the policy, and the exact log-posterior (P, N)."""
    prior, policy = (
        LanguageModel(model, toy.tokenizer, toy.max_completion_length, batch_size=512)
        for model in (toy.model, toy.random_policy(noise=0.1, seed=4))
    )
    posterior = Posterior(prior, MomentLikelihood(features, lambdas))
    evidence = [
        posterior.likelihood.log_likelihood([prompt] * len(toy.completions), toy.completions, toy.completion_ids)
        for prompt in toy.prompts
    ]
    evaluation = evaluate(policy, posterior, toy.prompts, n, torch.Generator().manual_seed(0))
    return evaluation, policy, toy.log_posterior(torch.stack(evidence))


def near(estimate: Estimate, expected: float):
    off = (estimate.mean - expected) / estimate.draws_standard_error
    assert abs(off) < 4, f"{estimate} for {expected:.4f}: off by {off:.1f} standard errors"


@pytest.fixture(scope="module")
def forbidding(large_toy):
    return evaluation_of(large_toy, {"even": even, "brief": brief}, {"even": LAMBDA, "brief": math.inf})


@pytest.mark.slow
def test_feature_means_are_those_of_the_enumeration(large_toy, forbidding):
    evaluation, policy, _ = forbidding
    values = torch.tensor([even(large_toy.completion_ids), brief(large_toy.completion_ids)])  # (2, N)
    log_pi = large_toy.log_probs(policy.model).detach()
    for draws, log_q in ((evaluation.from_prior, large_toy.log_prior), (evaluation.from_policy, log_pi)):
        means = feature_means(draws)
        for name, exact in zip(("even", "brief"), (log_q.exp() @ values.T).mean(0).tolist(), strict=True):
            near(means[name], exact)


def test_rejection_brings_the_policy_closer_by_the_share_it_keeps(large_toy, forbidding):
    evaluation, policy, log_p = forbidding
    log_pi, allowed = large_toy.log_probs(policy.model).detach(), log_p > -math.inf
    log_kept = torch.where(allowed, log_pi, -math.inf).log_softmax(-1)
    exact = torch.where(allowed, log_p.exp() * (log_p - log_kept), 0.0).sum(-1).mean().item()
    guarded = guarded_forward_kl(evaluation)
    near(guarded, exact)
    assert guarded.mean < evaluation.policy.forward_kl.mean
    assert guarded.low < guarded.mean < guarded.high


def test_nothing_to_reject(toy):
    evaluation, *_ = evaluation_of(toy, {"even": even}, {"even": LAMBDA}, n=60)
    guarded, forward_kl = guarded_forward_kl(evaluation), evaluation.policy.forward_kl
    assert (guarded.mean, guarded.standard_error) == pytest.approx((forward_kl.mean, forward_kl.standard_error))


def test_nothing_is_allowed(toy):
    def never(completions, **columns):
        return [0.0] * len(completions)

    evaluation, *_ = evaluation_of(toy, {"never": never}, {"never": math.inf}, n=40)
    assert guarded_forward_kl(evaluation) is None
    console = Console(file=io.StringIO(), width=120)
    console.print(control_table(evaluation, {"never": 1.0}))
    assert "never, 1 wanted" in console.file.getvalue()


def test_table_and_curves(toy, forbidding, tmp_path):
    console = Console(file=io.StringIO(), width=120)
    console.print(control_table(forbidding[0], {"even": 0.5, "brief": 1}))
    text = console.file.getvalue()
    for row in ("even, 0.5 wanted", "brief, 1 wanted", "KL from posterior, its forbidden", "forbidden (share)", "∞"):
        assert row in text
    names = ("moments/even", "forward_kl", "forward_kl_standard_error", "tv", "kl_to_prior")
    history = [{"step": step} | {f"posterior/{name}": 0.1 * step for name in names} for step in (1, 2, 3)]
    good = Estimate(1.0, 0.1, 0.8, 1.2, 0.1)
    bad = Estimate(1.0, 0.1, 0.8, 1.2, 0.1, trustworthy=False)
    for number, kl in enumerate((good, bad, None)):
        plot_control([*history, {"train_loss": 1.0}], {"even": 0.5}, kl, tmp_path / f"{number}.png")
    images = [(tmp_path / f"{number}.png").read_bytes() for number in range(3)]
    assert images[0].startswith(b"\x89PNG")
    assert images[0] != images[1] == images[2]
