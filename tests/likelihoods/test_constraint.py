"""Hard constraints and products of evidence: by hand, by enumeration, and what is refused."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.likelihoods import Constraint, Likelihood, ProductLikelihood, RewardLikelihood
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.testing import check_posterior, toy_reward

PROMPTS = ["p", "pp", "p"]
COMPLETIONS = ["a", "bb", "ab"]
IDS = [[1], [2, 2], [1, 2]]


def no_b(completions, **kwargs):
    return ["b" not in str(completion) for completion in completions]


def starts_with_a(completion_ids, **kwargs):
    return [int(ids[0] == 0) for ids in completion_ids]


def length(completions, **kwargs):
    return [len(completion) for completion in completions]


def prior_of(toy):
    return LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length)


def enumerated(toy, method):
    n = len(toy.completion_ids)
    return torch.stack([method([prompt] * n, toy.completions, toy.completion_ids) for prompt in toy.prompts])


@pytest.mark.parametrize(
    "answer", [[True, False, False], [1, 0, 0], [1.0, 0.0, 0.0], torch.tensor([True, False, False])]
)
def test_is_zero_or_forbidden(answer):
    constraint = Constraint(lambda **kwargs: answer)
    assert isinstance(constraint, Likelihood)
    result = constraint.log_likelihood(PROMPTS, COMPLETIONS, IDS)
    assert result.dtype is torch.float32
    assert result.tolist() == [0.0, -math.inf, -math.inf]
    assert constraint.bound == 0.0


def test_columns_reach_an_async_predicate():
    async def holds(completions, wanted, **kwargs):
        return [completion == answer for completion, answer in zip(completions, wanted, strict=True)]

    result = Constraint(holds).log_likelihood(PROMPTS, COMPLETIONS, IDS, {"wanted": ["a", "b", "ab"]})
    assert result.tolist() == [0.0, -math.inf, 0.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            [1, 0.5, 0],
            r"'check' must return True or False .* got 0\.5 in row 1: prompt 'pp', completion 'bb'\. Compare",
        ),
        ([1, 0, -1], "got -1 in row 2"),
        ([True, None, True], "got None in row 1"),
        ([True, math.nan, True], "'check' returned nan for completion 1"),
        ([True, True], "one reward for each of the 3 completions, got 2"),
        ([True, -math.inf, True], "'check' returned -inf for completion 1"),
    ],
)
def test_anything_but_yes_or_no_is_refused(answer, message):
    def check(**kwargs):
        return answer

    with pytest.raises(ValueError, match=message):
        Constraint(check).log_likelihood(PROMPTS, COMPLETIONS, IDS)


def test_what_is_no_predicate():
    with pytest.raises(TypeError, match=r"`predicate` must be a function.*got Linear.*`ClassifierLikelihood`"):
        Constraint(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="got bool"):
        Constraint(True)

    def broken(**kwargs):
        raise KeyError("word")

    with pytest.raises(KeyError) as error:
        Constraint(broken).log_likelihood(PROMPTS, COMPLETIONS, IDS)
    assert "'broken'" in error.value.__notes__[0]


def test_condition_is_the_prior_restricted(toy):
    posterior = prior_of(toy).condition(no_b)
    assert posterior.bound == 0.0
    log_density = enumerated(toy, posterior.log_density)
    allowed = torch.tensor(["b" not in text for text in toy.completions])
    log_posterior = log_density - log_density.logsumexp(-1, keepdim=True)
    restricted = toy.log_prior.exp() * allowed
    assert_close(log_posterior.exp(), restricted / restricted.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert 0.05 < float(restricted.sum(-1).min()) < float(restricted.sum(-1).max()) < 0.98
    check_posterior(posterior, toy.prompts, enumerable=toy)
    check_posterior(posterior, [[{"role": "user", "content": toy.prompts[1]}]], enumerable=toy)


def test_evidence_adds_up(toy):
    prior = prior_of(toy)
    posterior = prior.tilt(toy_reward, 0.5).condition(no_b).tilt(length, 2.0).condition(starts_with_a)
    allowed = torch.tensor(["b" not in text for text in toy.completions])
    allowed &= torch.tensor([ids[0] == 0 for ids in toy.completion_ids])
    lengths = torch.tensor([len(text) for text in toy.completions])
    expected = (toy.rewards / 0.5 + lengths / 2.0).masked_fill(~allowed, -math.inf)
    assert_close(enumerated(toy, posterior.log_likelihood), expected, rtol=0, atol=1e-4)
    assert_close(enumerated(toy, posterior.log_density), toy.log_prior + expected, rtol=0, atol=1e-4)
    check_posterior(posterior, toy.prompts, enumerable=toy)
    # one flat product, and a posterior like any other
    assert len(posterior.likelihood.likelihoods) == 4
    assert posterior.beta is None
    assert posterior.bound is None


def test_tilt_takes_its_options_in_a_product_too(toy):
    options = {"missing_eos_penalty": 1.0, "reward_weights": [2.0]}
    alone = enumerated(toy, prior_of(toy).tilt(toy_reward, 0.7, **options).log_likelihood)
    both = enumerated(toy, prior_of(toy).condition(no_b).tilt(toy_reward, 0.7, **options).log_likelihood)
    kept = both > -math.inf
    assert kept.any()
    assert_close(both[kept], alone[kept])


def test_powers_and_bounds():
    class Bounded:
        bound = 2.0

        def log_likelihood(self, prompts, completions, completion_ids, columns=None):
            return torch.tensor([2.0, 1.0, -math.inf])

    product = ProductLikelihood([Bounded(), Constraint(no_b)], powers=[0.5, 3])
    assert product.log_likelihood(PROMPTS, COMPLETIONS, IDS).tolist() == [1.0, -math.inf, -math.inf]
    assert product.bound == 1.0
    nested = ProductLikelihood([product, Bounded()], powers=[2.0, 1.0])
    assert nested.powers == [1.0, 6.0, 1.0]
    assert nested.log_likelihood(PROMPTS, COMPLETIONS, IDS).tolist() == [4.0, -math.inf, -math.inf]
    assert nested.bound == 4.0
    assert ProductLikelihood([nested, RewardLikelihood(length, 1.0)]).bound is None


def test_a_part_that_is_no_evidence_is_named(toy):
    class Broken:
        def __init__(self, *nats):
            self.nats = nats

        def log_likelihood(self, prompts, completions, completion_ids, columns=None):
            return torch.tensor(self.nats)

    def forbid(completions, **kwargs):
        return [False] * len(completions)

    # also in rows that another part forbids
    with pytest.raises(ValueError, match=r"`Broken\.log_likelihood` must be finite.* got inf in row 1"):
        ProductLikelihood([Constraint(forbid), Broken(0.0, math.inf, 0.0)]).log_likelihood(PROMPTS, COMPLETIONS, IDS)
    with pytest.raises(TypeError, match=r"shape \(3,\), got shape \(1,\)"):
        ProductLikelihood([Constraint(forbid), Broken(0.0)]).log_likelihood(PROMPTS, COMPLETIONS, IDS)
    with pytest.raises(ValueError, match="must be finite"):
        Posterior(prior_of(toy), ProductLikelihood([Broken(3e38), Broken(3e38)])).log_likelihood(["a"], ["b"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "at least one"),
        (([length],), TypeError, r"got function.*`Constraint\(predicate\)`"),
        (([Constraint(no_b)], [1.0, 2.0]), ValueError, "each of the 1 likelihoods, got 2"),
        (([Constraint(no_b)], [0.0]), ValueError, "positive and finite, got 0.0.*Leave a likelihood out"),
        (([Constraint(no_b)], [-1.0]), ValueError, "got -1.0"),
        (([Constraint(no_b)], ["2"]), TypeError, "got '2' of type str"),
    ],
)
def test_products_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        ProductLikelihood(*arguments)
