"""Ensembles as evidence: against the posteriors of the members, by enumeration of every completion."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.likelihoods import EnsembleLikelihood, Likelihood, RewardLikelihood
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.numerics import POOLING_RULES
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.rewards import PromptCenters, RewardEnsemble, prompt_centers
from rlhf_bayes.testing import check_posterior

BETA = 0.5
ALL_BUT_THE_MEAN = [rule for rule in POOLING_RULES if rule != "mean"]


class TextEnsemble:
    """Three members that share a taste for `a` and differ on `b` and the length; constants a prompt and a member."""

    num_members = 3

    def __init__(self, spread=1.0, constants=0.0):
        self.spread, self.constants = spread, constants

    def member_rewards(self, prompts, completions):
        rows = [
            [
                0.8 * completion.count("a")
                + self.spread * ((k - 0.7) * completion.count("b") - 0.3 * k * len(completion.split()))
                + self.constants * (k + 1) * math.sin(len(prompt) + k)
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            for k in range(3)
        ]
        return torch.tensor(rows)  # (K, B)


def on_toy(toy, likelihood):
    """Log-likelihood of every completion of every prompt: (P, N)."""
    n = len(toy.completions)
    return torch.stack([likelihood.log_likelihood([p] * n, toy.completions, toy.completion_ids) for p in toy.prompts])


def log_posterior(toy, log_likelihood):
    """(P, N): by the definition."""
    log_density = toy.log_prior + log_likelihood
    return log_density - log_density.logsumexp(-1, keepdim=True)


def member_log_likelihoods(toy, ensemble):
    """(K, P, N): straight from the rewards."""
    n = len(toy.completions)
    return torch.stack([ensemble.member_rewards([p] * n, toy.completions) for p in toy.prompts], 1) / BETA


def exact_centers(toy, ensemble):
    """Mean of each member's reward over the prior's completions, by enumeration."""
    rewards = BETA * member_log_likelihoods(toy, ensemble)  # (K, P, N)
    means = (toy.log_prior.exp() * rewards).sum(-1)  # (K, P)
    return PromptCenters(toy.prompts, means)


def centred(toy, ensemble, rule):
    centers = None if rule == "mean" else exact_centers(toy, ensemble)
    return EnsembleLikelihood(ensemble, BETA, rule, centers=centers)


def tv(log_p, log_q):
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)  # (P,)


def test_the_mean_is_the_geometric_pool_of_the_members_posteriors(toy):
    ensemble = TextEnsemble(constants=1.0)
    geometric = log_posterior(toy, member_log_likelihoods(toy, ensemble)).mean(0)  # (P, N)
    expected = geometric - geometric.logsumexp(-1, keepdim=True)
    assert_close(log_posterior(toy, on_toy(toy, EnsembleLikelihood(ensemble, BETA))), expected)


def test_the_marginal_is_the_mixture_of_the_members_posteriors_weighted_by_z(toy):
    ensemble = TextEnsemble(constants=0.5)
    members = member_log_likelihoods(toy, ensemble)  # (K, P, N)
    z = (toy.log_prior + members).logsumexp(-1).exp()  # (K, P)
    posteriors = log_posterior(toy, members).exp()
    expected = (z[..., None] * posteriors).sum(0) / z.sum(0)[:, None]
    marginal = log_posterior(toy, on_toy(toy, EnsembleLikelihood(ensemble, BETA, "marginal", centers=False)))
    assert_close(marginal.exp(), expected)
    # which is not the equal mixture
    assert (0.5 * (marginal.exp() - posteriors.mean(0)).abs().sum(-1) > 0.02).all()


def test_the_pessimistic_posterior_is_the_harmonic_pool(toy):
    ensemble = TextEnsemble()
    members = member_log_likelihoods(toy, ensemble)
    densities = (toy.log_prior + members).exp()
    expected = 1 / (1 / densities).mean(0)
    pessimistic = log_posterior(toy, on_toy(toy, EnsembleLikelihood(ensemble, BETA, "pessimistic", centers=False)))
    assert_close(pessimistic.exp(), expected / expected.sum(-1, keepdim=True))


def test_cut_is_the_equal_mixture_of_the_members_posteriors(toy):
    ensemble = TextEnsemble(constants=0.5)
    likelihood = EnsembleLikelihood(ensemble, BETA)
    posteriors = log_posterior(toy, member_log_likelihoods(toy, ensemble)).exp()  # (K, P, N)
    for k in range(3):
        assert_close(log_posterior(toy, on_toy(toy, likelihood.member(k))).exp(), posteriors[k])
    generator, num_draws = torch.Generator().manual_seed(0), 600
    drawn = torch.stack([log_posterior(toy, on_toy(toy, likelihood.cut(generator))).exp() for _ in range(num_draws)])
    standard_error = drawn.std(0) / math.sqrt(num_draws)  # (P, N)
    assert ((drawn.mean(0) - posteriors.mean(0)).abs() < 5 * standard_error + 1e-6).all()
    again = likelihood.cut(torch.Generator().manual_seed(3)), likelihood.cut(torch.Generator().manual_seed(3))
    assert_close(on_toy(toy, again[0]), on_toy(toy, again[1]))


@pytest.mark.parametrize("rule", POOLING_RULES)
def test_a_constant_per_prompt_and_member_matters_to_every_rule_but_the_mean(toy, rule):
    plain, moved = TextEnsemble(), TextEnsemble(constants=1.0)
    as_they_are = [
        log_posterior(toy, on_toy(toy, EnsembleLikelihood(ensemble, BETA, rule, centers=False)))
        for ensemble in (plain, moved)
    ]
    if rule == "mean":
        assert tv(*as_they_are).max() < 1e-5
    else:
        assert tv(*as_they_are).max() > 0.02
    on_a_common_zero = [log_posterior(toy, on_toy(toy, centred(toy, ensemble, rule))) for ensemble in (plain, moved)]
    assert tv(*on_a_common_zero).max() < 1e-5


def test_rules_in_order(toy):
    ensemble = TextEnsemble(constants=1.0)
    low, pessimistic, mean, marginal = (
        on_toy(toy, centred(toy, ensemble, rule)) for rule in ("min", "pessimistic", "mean", "marginal")
    )
    for below, above in ((low, pessimistic), (pessimistic, mean), (mean, marginal)):
        assert (below <= above + 1e-5).all()
        assert (below < above - 1e-3).any()


def test_pessimism_is_the_mean_less_the_variance_where_members_nearly_agree(toy):
    ensemble = TextEnsemble(spread=0.1)
    rewards = BETA * member_log_likelihoods(toy, ensemble)
    expected = (rewards.mean(0) - rewards.var(0, correction=0) / (2 * BETA)) / BETA
    pessimistic, to_second_order, weighed = (
        on_toy(toy, EnsembleLikelihood(ensemble, BETA, rule, penalty, centers=False))
        for rule, penalty in (("pessimistic", None), ("mean_minus_variance", None), ("mean_minus_variance", 3.0))
    )
    assert_close(to_second_order, expected)
    assert_close(weighed, (rewards.mean(0) - 3.0 * rewards.var(0, correction=0)) / BETA)
    third_order = (rewards - rewards.mean(0)).abs().max().pow(3) / BETA**2
    assert (pessimistic - expected).abs().max() < third_order / BETA
    assert (pessimistic - rewards.mean(0) / BETA).abs().max() > 10 * (pessimistic - expected).abs().max()


def test_pessimism_stays_closer_to_the_prior_where_members_disagree(toy):
    """The paper's wish: treads lightly where rewards are uncertain. Marginal does the opposite."""

    class Disagreeing(TextEnsemble):
        num_members = 2

        def member_rewards(self, prompts, completions):
            count = torch.tensor([completion.count("a") for completion in completions], dtype=torch.float32)
            return torch.stack([2.0 * count, 0.0 * count])

    mass = {}
    has_a = torch.tensor(["a" in completion for completion in toy.completions])
    for rule in ("pessimistic", "mean", "marginal"):
        likelihood = EnsembleLikelihood(Disagreeing(), BETA, rule, centers=False)
        mass[rule] = log_posterior(toy, on_toy(toy, likelihood))[:, has_a].exp().sum(-1)  # (P,)
    prior_mass = toy.log_prior[:, has_a].exp().sum(-1)
    assert (prior_mass < mass["pessimistic"]).all()
    assert (mass["pessimistic"] < mass["mean"]).all()
    assert (mass["mean"] < mass["marginal"]).all()


@pytest.mark.parametrize("rule", POOLING_RULES)
def test_keeps_the_contract_of_a_posterior(toy, rule):
    ensemble = TextEnsemble(constants=1.0)
    likelihood = centred(toy, ensemble, rule)
    assert isinstance(likelihood, Likelihood)
    prior = LanguageModel(toy.model, toy.tokenizer, max_completion_length=toy.max_completion_length)
    posterior = Posterior(prior, likelihood)
    assert posterior.beta == BETA
    check_posterior(posterior, toy.prompts, enumerable=toy)


def test_one_members_likelihood_runs_one_model_where_it_can():
    class Separate(TextEnsemble):
        def member_rewards(self, prompts, completions):
            raise AssertionError("all members were run")

        def member(self, k):
            return lambda prompts, completions, **kwargs: [10.0 * k + len(completion) for completion in completions]

    likelihood = EnsembleLikelihood(Separate(), BETA).member(2)
    assert likelihood.log_likelihood(["p", "p"], ["a", "aaa"], [[1], [2]]).tolist() == [42.0, 46.0]


def test_a_completion_that_one_member_forbids():
    class Forbidding(TextEnsemble):
        num_members = 2

        def member_rewards(self, prompts, completions):
            return torch.tensor([[1.0, -math.inf], [2.0, 3.0]])

    for rule in POOLING_RULES:
        result = EnsembleLikelihood(Forbidding(), BETA, rule, centers=False).log_likelihood(["p"] * 2, ["a", "b"])
        assert result[1].item() == (pytest.approx(3.0 / BETA - math.log(2)) if rule == "marginal" else -math.inf)


def test_heads_of_a_classifier(toy, make_classifier, reader_tokenizer):
    ensemble = RewardEnsemble(make_classifier(3), reader_tokenizer)
    prior = LanguageModel(toy.model, toy.tokenizer, max_completion_length=toy.max_completion_length)
    centers = prompt_centers(ensemble, prior, toy.prompts, num_samples=32, generator=torch.Generator().manual_seed(0))
    likelihood = EnsembleLikelihood(ensemble, BETA, "pessimistic", centers=centers)
    check_posterior(Posterior(prior, likelihood), toy.prompts, enumerable=toy)
    for k in range(3):
        assert_close(on_toy(toy, likelihood.member(k)), member_log_likelihoods(toy, ensemble)[k])


@pytest.mark.parametrize("rule", ALL_BUT_THE_MEAN)
def test_rules_that_need_centers_say_so(rule):
    with pytest.raises(ValueError, match=rf"`centers` must be given for the rule '{rule}'.*`prompt_centers\("):
        EnsembleLikelihood(TextEnsemble(), BETA, rule)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 0}, ValueError, "argmax"),
        ({"rule": "median"}, ValueError, "`rule` must be one of mean, pessimistic, .*got 'median'"),
        ({"penalty": 1.0}, ValueError, "`penalty` must be left out with the rule 'mean'"),
        ({"rule": "mean_minus_variance", "penalty": -1.0, "centers": False}, ValueError, "not negative, got -1.0"),
        ({"rule": "min", "centers": torch.zeros(3)}, TypeError, "`centers` must be PromptCenters, False or None"),
        ({"ensemble": len}, TypeError, "`num_members` and `member_rewards.*`RewardLikelihood`"),
    ],
)
def test_arguments_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        EnsembleLikelihood(**{"ensemble": TextEnsemble(), "beta": BETA} | arguments)


def test_a_broken_member_and_a_member_that_is_not_there(toy):
    class Broken(TextEnsemble):
        def member_rewards(self, prompts, completions):
            return super().member_rewards(prompts, completions) * math.nan

    with pytest.raises(ValueError, match=r"nan or \+inf from member 0"):
        EnsembleLikelihood(Broken(), BETA).log_likelihood(["p", "p"], ["a", "b"])
    likelihood = centred(toy, TextEnsemble(), "min")
    with pytest.raises(ValueError, match=r"1 of 2 are missing, the first 'p'.*`prompt_centers\("):
        likelihood.log_likelihood(["p", toy.prompts[0]], ["a", "b"])
    for k in (-1, 3):
        with pytest.raises(IndexError, match=f"between 0 and 2, the members, got {k}"):
            likelihood.member(k)


def test_the_reward_for_a_trainer_is_the_same_evidence(toy):
    likelihood = centred(toy, TextEnsemble(constants=1.0), "pessimistic")
    by_reward = RewardLikelihood(likelihood.pooled, BETA)
    assert_close(on_toy(toy, by_reward), on_toy(toy, likelihood))
