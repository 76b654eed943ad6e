"""Token-level values: each against enumeration by another route, and as a step of a distribution."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from rlhf_bayes.likelihoods import RewardLikelihood
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.samplers import EnumeratedValue, ExpertsValue, HeadValue, PrefixValue, Value
from rlhf_bayes.samplers.values import checked_log_value, checked_next_log_values
from rlhf_bayes.testing import toy_reward


def prior_of(toy, model=None, length=None):
    return LanguageModel(model or toy.model, toy.tokenizer, length or toy.max_completion_length)


def prefixes_of(toy):
    return sorted({tuple(ids[:length]) for ids in toy.completion_ids for length in range(len(ids) + 1)})


def prefix_log_prob(toy, log_prob, p, prefix):
    """log π(prefix | prompt): the mass of what starts so."""
    return log_prob[p, [tuple(ids[: len(prefix)]) == prefix for ids in toy.completion_ids]].logsumexp(0)


def test_the_soft_value_is_the_posterior_over_the_prior(toy):
    value = EnumeratedValue(toy.prompts, toy.completion_ids, toy.log_prior, toy.log_likelihood)
    assert isinstance(value, Value)
    log_posterior = toy.log_posterior()
    for p, prompt in enumerate(toy.prompts):
        prefixes = prefixes_of(toy)
        expected = [
            toy.log_z()[p] + prefix_log_prob(toy, log_posterior, p, x) - prefix_log_prob(toy, toy.log_prior, p, x)
            for x in prefixes
        ]
        assert_close(value.log_value([prompt] * len(prefixes), prefixes), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_prefix_value_is_the_evidence_of_the_prefix(toy):
    likelihood = RewardLikelihood(toy_reward, beta=0.5)
    value = PrefixValue(likelihood, toy.tokenizer)
    prefixes = [[0], [1, 0], [0, 1, 0], [1, toy.tokenizer.eos_token_id]]
    prompts = [toy.prompts[2]] * 4
    texts = toy.tokenizer.batch_decode(prefixes, skip_special_tokens=True)
    assert_close(value.log_value(prompts, prefixes), likelihood.log_likelihood(prompts, texts, prefixes))


def test_a_head_reads_the_state_after_the_prefix(toy):
    lm = prior_of(toy)
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0))
    value = HeadValue(lm, lambda hidden: logsigmoid(hidden @ weight))
    prompts, prefixes = toy.prompts, [[0], [1, 0], [0, 1, 0]]
    expected = []
    for prompt, prefix in zip(prompts, prefixes, strict=True):
        ids = torch.tensor([[*lm.prompt_token_ids([prompt])[0], *prefix]])
        with torch.no_grad():
            expected.append(logsigmoid(lm.model.base_model(ids).last_hidden_state[0, -1] @ weight))
    assert_close(value.log_value(prompts, prefixes), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_experts_minus_anti_experts(toy):
    models = [toy.random_policy(seed=1), toy.random_policy(seed=2)]
    value = ExpertsValue(*(prior_of(toy, model) for model in models), scale=0.7)
    log_prob, log_prob_anti = (toy.log_probs(model).detach() for model in models)
    for p, prompt in enumerate(toy.prompts):
        prefixes = prefixes_of(toy)
        difference = [
            prefix_log_prob(toy, log_prob, p, x) - prefix_log_prob(toy, log_prob_anti, p, x) for x in prefixes
        ]
        expected = 0.7 * torch.stack(difference)
        assert_close(value.log_value([prompt] * len(prefixes), prefixes), expected, rtol=1e-4, atol=1e-4)
        following = value.next_log_values([prompt], [[0]])[0]
        assert_close(
            following, value.log_value([prompt] * 4, [[0, token] for token in range(4)]), rtol=1e-4, atol=1e-4
        )


class Fixed:
    def __init__(self, values):
        self.values = values

    def log_value(self, prompts, prefixes):
        return self.values

    next_log_values = log_value


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            torch.tensor([0.0, math.nan]),
            ValueError,
            r"`Fixed` must be finite.*got nan for prompt 'b' and prefix \[1\]",
        ),
        (torch.tensor([math.inf, 0.0]), ValueError, "got inf for prompt 'a'"),
        (torch.zeros(2, 1), TypeError, r"`Fixed.log_value` must return a tensor of shape \(2,\), got shape \(2, 1\)"),
        ([0.0, 0.0], TypeError, "got a list"),
    ],
)
def test_what_is_no_value(values, error, message):
    with pytest.raises(error, match=message):
        checked_log_value(Fixed(values), ["a", "b"], [[0], [1]])


def test_values_may_forbid():
    values = torch.tensor([-math.inf, 0.0])
    assert torch.equal(checked_log_value(Fixed(values), ["a", "b"], [[0], [1]]), values)
    with pytest.raises(ValueError, match="got nan for prompt 'a'"):
        checked_next_log_values(Fixed(torch.tensor([[math.nan, 0.0]])), ["a"], [[0]])


def test_experts_must_share_a_vocabulary(toy, large_toy):
    with pytest.raises(ValueError, match="must share a vocabulary, got 4 and 9"):
        ExpertsValue(prior_of(toy), prior_of(large_toy))
    with pytest.raises(ValueError, match="`scale` must be finite"):
        ExpertsValue(prior_of(toy), prior_of(toy), scale=math.nan)
