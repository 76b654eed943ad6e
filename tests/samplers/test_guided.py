"""Weighted decoding: its density sums to 1, is that of its draws, and with the soft value is the posterior."""

import math

import pytest
import torch
from scipy.stats import chisquare
from torch.testing import assert_close

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.numerics import reverse_kl
from rlhf_bayes.samplers import EnumeratedValue, ExpertsValue, GuidedProposal, Proposal


def prior_of(toy, model=None, **options):
    return LanguageModel(model or toy.model, toy.tokenizer, toy.max_completion_length, **options)


def soft_value(toy, log_likelihood=None):
    evidence = toy.log_likelihood if log_likelihood is None else log_likelihood
    return EnumeratedValue(toy.prompts, toy.completion_ids, toy.log_prior, evidence)


class MeanValue:
    """E[log_likelihood | prefix] under the prior."""

    def __init__(self, toy):
        self.toy = toy

    def log_value(self, prompts, prefixes):
        toy, values = self.toy, []
        for prompt, prefix in zip(prompts, prefixes, strict=True):
            p = toy.prompts.index(prompt)
            rows = [ids[: len(prefix)] == list(prefix) for ids in toy.completion_ids]
            values.append((toy.log_prior[p, rows].softmax(0) * toy.log_likelihood[p, rows]).sum())
        return torch.stack(values)


def log_q(toy, proposal):
    n = len(toy.completion_ids)
    return torch.stack([proposal.log_prob([prompt] * n, toy.completion_ids) for prompt in toy.prompts])


def test_the_soft_value_gives_the_posterior(toy):
    proposal = GuidedProposal(prior_of(toy), soft_value(toy))
    assert isinstance(proposal, Proposal)
    assert_close(log_q(toy, proposal), toy.log_posterior(), rtol=1e-4, atol=1e-4)


def test_the_mean_value_does_not(toy):
    kls = reverse_kl(toy.log_posterior(), log_q(toy, GuidedProposal(prior_of(toy), MeanValue(toy))))
    of_prior = reverse_kl(toy.log_posterior(), toy.log_prior)
    assert (kls > 0.005).all()  # nats; with the soft value 0
    assert (kls < of_prior).all()  # a proposal all the same


@pytest.mark.parametrize("num_candidates", [2, 3, None])
@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_the_density_sums_to_one(toy, num_candidates, scale):
    proposal = GuidedProposal(prior_of(toy), soft_value(toy), scale, num_candidates)
    assert_close(log_q(toy, proposal).logsumexp(1), torch.zeros(3), rtol=0, atol=1e-5)


def test_tokens_that_are_no_candidates_keep_their_prior_probability(toy):
    log_prior = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    value = soft_value(toy)
    result = GuidedProposal(prior_of(toy), value, 1.0, 2).next_log_probs([toy.prompts[0]], [[]], log_prior).exp()
    tilt = value.log_value([toy.prompts[0]] * 2, [[0], [2]]).exp() * torch.tensor([0.4, 0.3])
    expected = torch.tensor([0.7 * tilt[0] / tilt.sum(), 0.1, 0.7 * tilt[1] / tilt.sum(), 0.2])
    assert_close(result[0], expected)


def test_draws_come_from_the_density(toy):
    n, proposal = 1500, GuidedProposal(prior_of(toy, batch_size=700), soft_value(toy), 0.6, 3)
    drawn = proposal.sample(toy.prompts, n, torch.Generator().manual_seed(0))
    assert_close(drawn.log_prob, proposal.log_prob(drawn.prompts, drawn.completion_ids), rtol=1e-4, atol=1e-4)
    probs = log_q(toy, proposal).double().softmax(1)
    index = {tuple(ids): column for column, ids in enumerate(toy.completion_ids)}
    for p in range(len(toy.prompts)):
        rows = torch.tensor([index[tuple(ids)] for ids in drawn.completion_ids[p * n : (p + 1) * n]])
        counts, expected = torch.bincount(rows, minlength=len(index)).double(), probs[p] * n
        rare = expected < 5
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        assert chisquare(counts, expected).pvalue > 1e-4


def test_a_seed_reproduces(toy):
    proposal = GuidedProposal(prior_of(toy), soft_value(toy))
    drawn = [proposal.sample(toy.prompts, 4, torch.Generator().manual_seed(s)).completion_ids for s in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_does_not_matter(toy, batch_size):
    value = ExpertsValue(prior_of(toy, toy.random_policy(seed=1)), prior_of(toy, toy.random_policy(seed=2)))
    large, small = (GuidedProposal(prior_of(toy, batch_size=size), value) for size in (1000, batch_size))
    assert_close(log_q(toy, small), log_q(toy, large), rtol=1e-4, atol=1e-4)


def test_dexperts_with_the_prior_as_anti_expert_is_the_expert(toy):
    expert = toy.random_policy(seed=4)
    proposal = GuidedProposal(prior_of(toy), ExpertsValue(prior_of(toy, expert), prior_of(toy)))
    assert_close(log_q(toy, proposal), toy.log_probs(expert).detach(), rtol=1e-4, atol=1e-4)


def test_prefixes_that_lead_nowhere_are_not_drawn(toy):
    forbidden = torch.tensor([ids[0] == 0 for ids in toy.completion_ids])
    evidence = toy.log_likelihood.masked_fill(forbidden, -math.inf)
    proposal = GuidedProposal(prior_of(toy), soft_value(toy, evidence))
    assert_close(log_q(toy, proposal), toy.log_posterior(evidence), rtol=1e-4, atol=1e-4)
    # nothing is left: the prior goes on, and the weight will be 0
    log_prior = toy.log_prior[0, :4].log_softmax(0)[None]
    assert_close(proposal.next_log_probs([toy.prompts[0]], [[0]], log_prior), log_prior)


class Nan:
    def log_value(self, prompts, prefixes):
        return torch.full((len(prefixes),), math.nan)


def test_bad_input(toy):
    prior, value = prior_of(toy), soft_value(toy)
    with pytest.raises(ValueError, match="`Nan` must be finite"):
        GuidedProposal(prior, Nan()).sample(toy.prompts)
    with pytest.raises(TypeError, match="`value` must have a method `log_value`, got float"):
        GuidedProposal(prior, 1.0)
    with pytest.raises(ValueError, match="`scale` must be positive"):
        GuidedProposal(prior, value, 0.0)
    with pytest.raises(ValueError, match="`num_candidates` must be at least 2, got 1"):
        GuidedProposal(prior, value, num_candidates=1)
    proposal = GuidedProposal(prior, value)
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1, got 0"):
        proposal.sample(toy.prompts, 0)
    eos = toy.tokenizer.eos_token_id
    for ids, message in [([0], "it is a prefix"), ([eos, 0], "has 2 tokens and ends after 1"), ([], "is a prefix")]:
        with pytest.raises(ValueError, match=message):
            proposal.log_prob([toy.prompts[0]], [ids])
    with pytest.raises(ValueError, match="one entry a row, got 3 and 1"):
        proposal.log_prob(toy.prompts, [[eos]])
