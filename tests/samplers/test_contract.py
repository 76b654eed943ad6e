"""What every sampler keeps: chats and texts alike, rows in order, and numbers that no batch or padding changes."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes import samplers
from rlhf_bayes.likelihoods import Constraint
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.samplers import (
    SMC,
    BestOfN,
    GuidedProposal,
    ImportanceSampler,
    MetropolisHastings,
    PrefixValue,
    RejectionSampler,
    all_samplers,
)
from rlhf_bayes.testing import EnumerableLM, toy_reward

from .enumerated import policy_of, prior_of, seeded

PAGE = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")


def guided_smc(policy, value):
    return SMC(value, GuidedProposal(policy, value), ess_threshold=0.9)


def by_flags(name):
    """As `rlhf-bayes sample` makes it for 6 completions a prompt."""
    return lambda policy: all_samplers.SAMPLERS[name].make(prior_of_policy(policy), policy, 6)


def prior_of_policy(policy):
    return policy.condition(not_only_a).tilt(toy_reward, 1.0)


# every sampler as its record makes it, and others by settings that it does not use
SAMPLERS = {name: by_flags(name) for name in all_samplers.SAMPLERS} | {
    "resampling": lambda policy: ImportanceSampler(policy, num_candidates=50),
    "rejection, a bound": lambda policy: RejectionSampler(policy, log_bound=1.0, quasi=True, max_draws=300),
    "guard": lambda policy: RejectionSampler(policy, log_bound=-math.inf, quasi=True),
    "best of 8": lambda policy: BestOfN(8, proposal=policy),
    "two chains": lambda policy: MetropolisHastings("suffix", policy, num_chains=2, burn_in=2),
    "guided smc": lambda policy: guided_smc(policy, PrefixValue(Constraint(not_only_a), policy.tokenizer)),
    "independence": lambda policy: MetropolisHastings("independence", policy, num_chains=2, burn_in=2),
}


def not_only_a(completion_ids, **kwargs):
    return [ids[:2] != [0, 0] for ids in completion_ids]


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_are_those_of_their_prompts(toy, name):
    chats = [[{"role": "user", "content": prompt}] for prompt in toy.prompts]
    for prompts in (toy.prompts, chats):
        posterior = prior_of(toy).condition(not_only_a).tilt(toy_reward, 1.0)
        draws = SAMPLERS[name](policy_of(toy)).sample(posterior, prompts, 6, seeded())
        assert draws.counts.tolist() == [6, 6, 6]
        assert draws.prompts == [prompts[index] for index in draws.prompt_index]
        assert draws.prompt_index.tolist() == sorted(draws.prompt_index.tolist())
        assert draws.texts == toy.tokenizer.batch_decode(draws.completion_ids, skip_special_tokens=True)
        messages = [[{"role": "assistant", "content": text}] for text in draws.texts]
        assert draws.completions == (messages if prompts is chats else draws.texts)
        assert draws.info["tokens"] >= sum(len(ids) for ids in draws.completion_ids) or name == "resampling"
        assert_close(draws.weights.sum(), torch.tensor(3.0, dtype=torch.float64))


@pytest.mark.parametrize("name", all_samplers.SAMPLERS)
def test_a_record_says_what_its_sampler_is(toy, name):
    record = all_samplers.SAMPLERS[name]
    sampler = by_flags(name)(policy_of(toy))
    assert type(sampler) is record.sampler
    assert sampler.guarantee in record.guarantees
    assert all(guarantee in record.guarantee for guarantee in record.guarantees)
    assert len(record.help) > 10
    exported = getattr(samplers, record.sampler.__name__)
    assert exported is record.sampler


def test_the_default_is_what_targets_the_posterior():
    assert all_samplers.samplers_of_the_posterior() == ["importance", "rejection", "metropolis_hastings", "smc"]


def test_the_table_in_the_readme_is_theirs():
    table = PAGE.split("| sampler (`rlhf_bayes.samplers`) |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", table, re.MULTILINE)
    assert rows == [(r.sampler.__name__, r.guarantee, r.help) for r in all_samplers.SAMPLERS.values()]


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_weights_do_not_depend_on_batch_or_padding(pad_is_eos):
    """The log-weights of completions drawn together, against each scored alone."""
    toy = EnumerableLM(vocab_size=4, max_completion_length=3, pad_is_eos=pad_is_eos)
    prior, policy = (LanguageModel(lm.model, toy.tokenizer, 3, batch_size=7) for lm in (prior_of(toy), policy_of(toy)))
    posterior = prior.tilt(toy_reward, 1.0)
    draws = ImportanceSampler(policy).sample(posterior, toy.prompts, 10, seeded())
    alone = [
        float(posterior.log_density([p], None, [ids]) - policy.log_prob([p], [ids]))
        for p, ids in zip(draws.prompts, draws.completion_ids, strict=True)
    ]
    assert_close(draws.log_weights, torch.tensor(alone, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"n": 0}, ValueError, "`n` must be an integer of at least 1, got 0"),
        ({"n": 2.0}, ValueError, "`n` must be an integer of at least 1, got 2.0"),
        ({"prompts": []}, ValueError, "`prompts` must be a non-empty list"),
        ({"prompts": "a"}, ValueError, "`prompts` must be a non-empty list"),
        ({"prompts": ["a", 1]}, TypeError, "`prompts` must hold texts or chats, row 1 is 1"),
        ({"prompts": ["a", ""]}, ValueError, "Each prompt must have at least one token"),
        ({"generator": 5}, TypeError, "`generator` must be a torch.Generator, got 5"),
        ({"columns": {"x": [1]}}, ValueError, r"`columns\['x'\]` must have one entry a prompt, 3, got 1"),
        ({"posterior": "prior"}, TypeError, "`posterior` must be a Posterior, got LanguageModel"),
        ({"posterior": "nan"}, ValueError, "returned nan for completion"),
        ({"posterior": "words"}, TypeError, "a reward must be a number or None"),
    ],
)
def test_bad_requests_are_refused_in_words(toy, name, wrong, error, message):
    def nan(completions, **columns):
        return [math.nan] * len(completions)

    def words(completions, **columns):
        return list(completions)

    prior = prior_of(toy)
    posteriors = {"prior": prior, "nan": prior.tilt(nan, 1.0), "words": prior.tilt(words, 1.0)}
    request = {"posterior": prior.tilt(toy_reward, 1.0), "prompts": toy.prompts, "n": 2, "generator": seeded()} | wrong
    request["posterior"] = posteriors.get(wrong.get("posterior"), request["posterior"])
    with pytest.raises(error, match=message):
        SAMPLERS[name](policy_of(toy)).sample(**request)


PROPOSED = {
    "importance": ImportanceSampler,
    "rejection": lambda proposal: RejectionSampler(proposal, max_tv=0.1),
    "best of n": lambda proposal: BestOfN(4, proposal=proposal),
    "independence": lambda proposal: MetropolisHastings("independence", proposal),
    "suffix": lambda proposal: MetropolisHastings("suffix", proposal),
    "smc": lambda proposal: SMC(PrefixValue(Constraint(not_only_a), None), proposal),
}


@pytest.mark.parametrize("name", PROPOSED)
def test_proposals_that_are_none_or_of_another_support(toy, name):
    posterior = prior_of(toy).tilt(toy_reward, 1.0)
    for proposal in ("gpt2", toy.model):
        with pytest.raises(TypeError, match=rf"`proposal` must .*got {type(proposal).__name__}"):
            PROPOSED[name](proposal).sample(posterior, toy.prompts, 2)
    other = EnumerableLM(vocab_size=5, max_completion_length=3)
    for model in (LanguageModel(toy.model, toy.tokenizer, 2), LanguageModel(other.model, other.tokenizer, 3)):
        with pytest.raises(ValueError, match="`proposal` must draw completions of the prior's support"):
            PROPOSED[name](model).sample(posterior, toy.prompts, 2)
