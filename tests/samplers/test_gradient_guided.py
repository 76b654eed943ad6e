"""PPLM on the toy: a density that sums to 1 and is that of its draws, an attribute that rises, and weights that undo
it."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.samplers import SMC, EnumeratedValue, GradientGuidedProposal, ImportanceSampler, Proposal

from ..lm.families import tiny_model, tiny_tokenizer
from .enumerated import assert_draws_follow, assert_within, prior_of, seeded, tilted


def attribute(toy, seed=0):
    """A linear head on hidden states, log σ(w·h)."""
    weight = torch.randn(toy.model.config.hidden_size, generator=seeded(seed))
    return lambda hidden: logsigmoid(hidden @ weight)


def guided(toy, **options):
    return GradientGuidedProposal(prior_of(toy), attribute(toy), **({"step_size": 1.0} | options))


def log_q(toy, proposal):
    n = len(toy.completion_ids)
    return torch.stack([proposal.log_prob([prompt] * n, toy.completion_ids) for prompt in toy.prompts])


def test_the_density_sums_to_one_and_is_not_the_priors(toy):
    proposal = guided(toy)
    assert isinstance(proposal, Proposal)
    log_probs = log_q(toy, proposal)
    assert_close(log_probs.logsumexp(1), torch.zeros(3), rtol=0, atol=1e-5)
    assert (log_probs - toy.log_prior).abs().max() > 0.3


@pytest.mark.slow
def test_draws_come_from_the_density(toy):
    proposal = guided(toy, num_steps=1)
    drawn = proposal.sample(toy.prompts, 500, seeded(1))
    assert_close(drawn.log_prob, proposal.log_prob(drawn.prompts, drawn.completion_ids), rtol=1e-4, atol=1e-4)
    draws = ImportanceSampler(proposal).sample(tilted(toy), toy.prompts, 500, seeded(2))
    assert_draws_follow(toy, draws, log_q(toy, proposal).log_softmax(1))
    for p in range(3):
        half = float(draws.log_z.high[p] - draws.log_z.log_z[p])
        assert_within(draws.log_z.log_z[p], half / 1.96, toy.log_z()[p], f"log Z of prompt {p}")


def test_each_row_is_by_itself(toy):
    # prompts of 1, 2 and 4 tokens in one batch, or one at a time
    proposal = guided(toy)
    single = guided(toy)
    single.prior.batch_size = 1
    ids = [toy.completion_ids[i] for i in (3, 17, 30)]
    assert_close(proposal.log_prob(toy.prompts, ids), single.log_prob(toy.prompts, ids), rtol=1e-4, atol=1e-4)


def test_steps_raise_the_attribute(toy):
    prompts, prefixes = [toy.prompts[2]] * 2, [[0, 1], [1, 0]]
    reached = []
    for num_steps, kl_scale in ((1, 0.0), (4, 0.0), (4, 1e3)):
        proposal = guided(toy, num_steps=num_steps, step_size=0.05, kl_scale=kl_scale)
        past = proposal._reader.past(prompts, prefixes)
        log_prior = proposal._reader.next_log_probs(proposal._reader.read(prompts, prefixes).hidden)
        pushed = proposal._pushed(past, torch.tensor([1, 0]), log_prior)
        reached.append(attribute(toy)(pushed))
    before = attribute(toy)(proposal._reader.read(prompts, prefixes).hidden)
    assert (before < reached[0]).all()
    assert (reached[0] < reached[1]).all()
    assert (reached[2] < reached[1]).all()  # held to the prior


def test_smc_corrects_it(toy):
    value = EnumeratedValue(toy.prompts, toy.completion_ids, toy.log_prior, toy.log_likelihood)
    runs = 60
    prompts = [prompt for prompt in toy.prompts for _ in range(runs)]
    draws = SMC(value, guided(toy, num_steps=1), 0.9).sample(tilted(toy), prompts, 8, seeded(3))
    ratio = (draws.log_z.log_z.view(3, runs) - toy.log_z()[:, None]).exp()
    for p in range(3):
        assert_within(ratio[p].mean(), ratio[p].std() / math.sqrt(runs), 1.0, f"Ẑ/Z of prompt {p}")


def test_without_a_past_it_is_the_prior(toy):
    proposal, log_prior = guided(toy), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    assert torch.equal(proposal.next_log_probs([toy.prompts[0]], [[]], log_prior), log_prior)


def test_bad_input(toy):
    prior = prior_of(toy)
    for options in ({"num_steps": 0}, {"step_size": 0.0}, {"kl_scale": -1.0}, {"fusion": 1.5}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            GradientGuidedProposal(prior, attribute(toy), **options)
    with pytest.raises(TypeError, match=r"`head` must return a tensor of shape \(1,\)"):
        GradientGuidedProposal(prior, lambda hidden: hidden).sample([toy.prompts[1]])
    with pytest.raises(ValueError, match="`head` must return finite numbers"):
        GradientGuidedProposal(prior, lambda hidden: hidden.sum(1) * math.nan).sample([toy.prompts[1]])
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1, got 0"):
        guided(toy).sample(toy.prompts, 0)


def test_sliding_windows_are_refused():
    lm = LanguageModel(tiny_model("gemma2"), tiny_tokenizer(), max_completion_length=4)
    with pytest.raises(ValueError, match="must keep keys and values of all positions, got a cache of"):
        GradientGuidedProposal(lm, lambda hidden: hidden.sum(1)).sample(["ab"])
