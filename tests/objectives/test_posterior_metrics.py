"""`posterior_metrics` against enumeration: every completion of the toy once, or draws with known weights."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.testing import EnumerableLM
from rlhf_bayes.trainers import posterior_metrics

NAMES = {"kl_to_prior", "elbo", "log_z", "gap", "gap_standard_error", "importance_ess"}


def draw(toy, policy, n):
    """n completions of each prompt from `policy`: rewards, log-ratios, both (P · n,), rows of a prompt neighbours."""
    log_policy = toy.log_probs(policy).detach()  # (P, N)
    index = torch.multinomial(log_policy.exp(), n, replacement=True, generator=torch.Generator().manual_seed(0))
    log_ratios = log_policy - toy.log_prior
    return toy.rewards.gather(1, index).flatten(), log_ratios.gather(1, index).flatten()


def test_at_the_posterior_every_completion_has_the_same_weight(toy):
    log_ratios = (toy.log_posterior() - toy.log_prior)[:, ::5].flatten()  # any completions: (P · 8,)
    rewards = toy.rewards[:, ::5].flatten()
    metrics = posterior_metrics(rewards, log_ratios, log_ratios, toy.beta, num_generations=8)
    log_z = toy.log_z().mean().item()
    assert_close(metrics["posterior/log_z"], log_z, rtol=1e-5, atol=1e-5)
    assert_close(metrics["posterior/elbo"], log_z, rtol=1e-5, atol=1e-5)
    assert metrics["posterior/gap"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["posterior/importance_ess"] == pytest.approx(8.0, abs=1e-4)


def test_away_from_it_the_estimates_are_those_of_enumeration(toy):
    policy, n = toy.random_policy(noise=0.05), 4000
    rewards, log_ratios = draw(toy, policy, n)
    metrics = posterior_metrics(rewards, log_ratios, log_ratios, toy.beta, num_generations=n)
    se = (rewards / toy.beta - log_ratios).std().item() / math.sqrt(3 * n)
    elbo, gap = toy.elbo(policy).mean().item(), toy.reverse_kl(policy).mean().item()
    kl = (toy.log_probs(policy).exp() * (toy.log_probs(policy) - toy.log_prior)).sum(-1).mean().item()
    assert abs(metrics["posterior/elbo"] - elbo) < 5 * se
    assert abs(metrics["posterior/kl_to_prior"] - kl) < 5 * log_ratios.std().item() / math.sqrt(3 * n)
    log_z_se = math.sqrt(1 / metrics["posterior/importance_ess"] - 1 / n) / math.sqrt(3)
    assert abs(metrics["posterior/log_z"] - toy.log_z().mean().item()) < 5 * log_z_se
    assert abs(metrics["posterior/gap"] - gap) < 5 * (se + log_z_se)
    assert gap > 0.5  # far from the posterior, or nothing was tested


def test_few_completions_give_the_gap_without_most_of_its_bias():
    """Of the prior's KL to the posterior, the log of a mean of 2 completions would show 36 %, and of 8, 79 %."""
    toy = EnumerableLM(vocab_size=7, max_completion_length=2)
    log_prior, evidence = toy.log_prior.double(), toy.log_likelihood.double()  # (P, N)
    truth = (toy.log_z().double() - (log_prior.exp() * evidence).sum(-1)).mean().item()
    pairs = torch.logaddexp(evidence[:, :, None], evidence[:, None]) - math.log(2)  # (P, N, N)
    probs = (log_prior[:, :, None] + log_prior[:, None]).exp()
    exact_of_two = 2 * ((probs * pairs).sum((-2, -1)) - (log_prior.exp() * evidence).sum(-1)).mean().item()
    rewards, log_ratios = draw(toy, toy.model, 16_000)
    gaps = {}
    for num_generations in (2, 8):
        metrics = posterior_metrics(rewards, log_ratios, log_ratios, toy.beta, num_generations)
        gaps[num_generations] = metrics["posterior/gap"]
        assert metrics["posterior/gap_standard_error"] < 0.01 * truth
    assert gaps[2] == pytest.approx(exact_of_two, rel=0.04)
    assert 0.65 * truth < gaps[2] < 0.8 * truth
    assert 0.93 * truth < gaps[8] < 1.03 * truth


def test_the_gap_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-4, 1.0, 100.0):
        rewards, log_ratios = scale * torch.randn(2, 60, generator=generator)
        gap = posterior_metrics(rewards, log_ratios, log_ratios, 0.5, 4)["posterior/gap"]
        assert gap >= 0
    one_weight = posterior_metrics(torch.tensor([0.0, -1e3, -1e3, -1e3]), torch.zeros(4), torch.zeros(4), 1.0, 4)
    # 4·log(1/4) − 3/4·(3·log(1/3) − 1000)
    assert one_weight["posterior/log_z"] == pytest.approx(750 - 4 * math.log(4) + 9 / 4 * math.log(3))
    assert one_weight["posterior/importance_ess"] == pytest.approx(1.0)


def test_by_hand_prompts_are_averaged_after_the_logarithm():
    log_weights = torch.tensor([0.0, math.log(3.0), 5.0, 5.0])
    metrics = posterior_metrics(0.5 * log_weights, torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 6.0]), 0.5, 2)
    # the jackknife of two: 2·log of their mean, minus the mean of their logs
    assert metrics["posterior/log_z"] == pytest.approx((2 * math.log(2.0) - math.log(3.0) / 2 + 5.0) / 2)
    assert metrics["posterior/elbo"] == pytest.approx((math.log(3.0) + 10.0) / 4)
    assert metrics["posterior/gap"] == pytest.approx(math.log(2.0) - math.log(3.0) / 2)
    # of the mean of two gaps, the other 0
    assert metrics["posterior/gap_standard_error"] == pytest.approx(math.log(2.0) - math.log(3.0) / 2)
    assert metrics["posterior/importance_ess"] == pytest.approx((16 / 10 + 2) / 2)
    assert metrics["posterior/kl_to_prior"] == 3.0


def test_by_hand_completions_of_a_proposal():
    log_weights, weights = torch.tensor([1.0, 3.0, 2.0, 4.0]), torch.tensor([0.5, 1.5, 2.0, 1.0])
    kls, log_zs = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.full((4,), 5.0)
    metrics = posterior_metrics(log_weights, torch.zeros(4), kls, 1.0, 2, log_zs, weights)
    elbo = (0.5 * 1 + 1.5 * 3 + 2 * 2 + 1 * 4) / 5
    assert metrics["posterior/elbo"] == pytest.approx(elbo)
    assert metrics["posterior/gap"] == pytest.approx(5 - elbo)
    assert metrics["posterior/kl_to_prior"] == pytest.approx((0.5 * 1 + 1.5 * 2 + 2 * 3 + 1 * 6) / 5)
    # of the prompts' means (0.5·4 + 1.5·2)/2 and (2·3 + 1·1)/2
    assert metrics["posterior/gap_standard_error"] == pytest.approx(abs(2.5 - 3.5) / 2)
    assert "posterior/importance_ess" not in metrics


def test_rows_without_reward_are_left_out():
    rewards = torch.tensor([1.0, torch.nan, 2.0, 4.0])
    log_ratios = torch.tensor([0.1, 0.2, 0.3, 0.5])
    metrics = posterior_metrics(rewards, log_ratios, log_ratios, 1.0, 2)
    assert metrics["posterior/elbo"] == pytest.approx((0.9 + 1.7 + 3.5) / 3)
    # a prompt with a row left out has no estimate of log Z of its own
    assert metrics["posterior/gap"] == pytest.approx(2 * (math.log((math.exp(1.7) + math.exp(3.5)) / 2) - 2.6))
    assert metrics["posterior/kl_to_prior"] == pytest.approx(0.275)
    nothing = posterior_metrics(torch.full((4,), torch.nan), log_ratios, log_ratios, 1.0, 2)
    assert set(nothing) == {"posterior/kl_to_prior"}


def test_without_beta_there_is_no_posterior():
    ones = torch.ones(4)
    assert posterior_metrics(ones, ones, 2 * ones, 0.0, 2) == {"posterior/kl_to_prior": 2.0}


def test_one_completion_says_nothing_of_the_gap():
    metrics = posterior_metrics(torch.tensor([1.0, 2.0]), torch.zeros(2), torch.zeros(2), 0.5, 1)
    assert metrics == {"posterior/kl_to_prior": 0.0, "posterior/elbo": 3.0}


def test_names():
    ones = torch.ones(4)
    assert set(posterior_metrics(ones, ones, ones, 0.5, 2)) == {f"posterior/{name}" for name in NAMES}
