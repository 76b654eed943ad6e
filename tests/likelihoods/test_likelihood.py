"""What a likelihood tells of the features behind it, beside the nats."""

import math

import pytest
import torch

from rlhf_bayes.likelihoods import (
    Constraint,
    MomentLikelihood,
    ProductLikelihood,
    RewardLikelihood,
    checked_evidence,
    known_forbids,
)

ROWS = (["p", "p", "q"], ["a", "b", "ab"], [[1], [2], [1, 2]])


def no_b(completions, **kwargs):
    return ["b" not in completion for completion in completions]


def length(completions, **kwargs):
    return [len(completion) for completion in completions]


def moments(lam):
    return MomentLikelihood({"length": length, "no_b": no_b}, {"length": lam, "no_b": 1.0})


def test_a_condition_tells_its_predicate():
    evidence = checked_evidence(Constraint(no_b), *ROWS)
    assert evidence.log_likelihood.tolist() == [0.0, -math.inf, -math.inf]
    assert {name: x.tolist() for name, x in evidence.features.items()} == {"no_b": [1.0, 0.0, 0.0]}


def test_moments_tell_all_their_features():
    evidence = checked_evidence(moments(0.5), *ROWS)
    assert evidence.log_likelihood.tolist() == [1.5, 0.5, 1.0]
    features = {name: x.tolist() for name, x in evidence.features.items()}
    assert features == {"length": [1.0, 1.0, 2.0], "no_b": [1.0, 0.0, 0.0]}


def test_a_product_tells_the_features_of_all_and_numbers_what_comes_again():
    product = ProductLikelihood([moments(0.5), Constraint(no_b), Constraint(no_b)], powers=[2.0, 1.0, 1.0])
    evidence = checked_evidence(product, *ROWS)
    assert evidence.log_likelihood.tolist() == [3.0, -math.inf, -math.inf]
    # as they are, whatever the power
    assert {name: x.tolist() for name, x in evidence.features.items()} == {
        "length": [1.0, 1.0, 2.0],
        "no_b": [1.0, 0.0, 0.0],
        "no_b_2": [1.0, 0.0, 0.0],
        "no_b_3": [1.0, 0.0, 0.0],
    }


def test_one_that_tells_nothing_is_evidence_all_the_same():
    class Plain:
        def log_likelihood(self, prompts, completions, completion_ids, columns=None):
            return torch.tensor([1.0, -math.inf, 2.0])

    evidence = checked_evidence(Plain(), *ROWS)
    assert evidence.log_likelihood.tolist() == [1.0, -math.inf, 2.0]
    assert evidence.features == {}
    reward = checked_evidence(RewardLikelihood(length, 0.5), *ROWS)
    assert reward.log_likelihood.tolist() == [2.0, 2.0, 4.0]


@pytest.mark.parametrize("values", [[math.nan, 0.0, 0.0], [0.0, math.inf, 0.0]])
def test_what_is_told_is_checked(values):
    class Broken:
        def log_likelihood(self, prompts, completions, completion_ids, columns=None):
            raise AssertionError("`evidence` says it all")

        def evidence(self, prompts, completions, completion_ids, columns=None):
            return RewardLikelihood(length, 1.0).evidence(*ROWS)._replace(log_likelihood=torch.tensor(values))

    with pytest.raises(ValueError, match=r"`Broken\.log_likelihood` must be finite"):
        checked_evidence(Broken(), *ROWS)


class Silent:
    def log_likelihood(self, prompts, completions, completion_ids, columns=None):
        return torch.zeros(len(prompts))


def telling(value):
    likelihood = Silent()
    likelihood.forbids = value
    return likelihood


# name: evidence, what it says
SAID = {
    "a condition": (Constraint(no_b), True),
    "a reward": (RewardLikelihood(length, 0.5), None),
    "moments": (moments(0.5), False),
    "a limit": (MomentLikelihood({"no_b": no_b}, {"no_b": math.inf}), True),
    "the other limit": (MomentLikelihood({"no_b": no_b}, {"no_b": -math.inf}), True),
    "one's own": (Silent(), None),
    "one's own that tells": (telling(False), False),
    "a product of finite ones": (ProductLikelihood([moments(0.5), telling(False)]), False),
    "a product with a silent one": (ProductLikelihood([moments(0.5), Silent()]), None),
    "a product with a condition": (ProductLikelihood([Silent(), moments(0.5), Constraint(no_b)]), True),
    "a product of products": (ProductLikelihood([Silent(), ProductLikelihood([telling(True)])]), True),
}


@pytest.mark.parametrize("name", SAID)
def test_whether_evidence_forbids(name):
    likelihood, said = SAID[name]
    assert known_forbids(likelihood) is said


def test_a_reward_may_be_said_to_forbid():
    likelihood = RewardLikelihood(length, 0.5)
    likelihood.forbids = True
    assert known_forbids(ProductLikelihood([likelihood])) is True
    assert known_forbids(RewardLikelihood(length, 0.5)) is None


def test_forbids_is_a_bool_or_none():
    with pytest.raises(TypeError, match=r"`Silent\.forbids` must be True, False or None, got 1 of type int"):
        known_forbids(telling(1))
