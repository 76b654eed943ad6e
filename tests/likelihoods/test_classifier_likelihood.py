"""Classifiers as evidence: against probabilities of single texts, and against conditioning by enumeration."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.likelihoods import ClassifierLikelihood, Likelihood
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.rewards import RewardIndex
from rlhf_bayes.testing import check_posterior

NAMED = {"label2id": {"bad": 0, "so-so": 1, "good": 2}, "id2label": {0: "bad", 1: "so-so", 2: "good"}}


@torch.no_grad()
def logits_of(model, tokenizer, prompt, completions):
    """One text at a time, no padding: (N, L)."""
    ids = [tokenizer.convert_tokens_to_ids(list(prompt + completion)) for completion in completions]
    return torch.cat([model(input_ids=torch.tensor([row])).logits for row in ids])


def rows(toy, prompt):
    n = len(toy.completions)
    return [prompt] * n, toy.completions, toy.completion_ids


def test_one_logit_has_two_answers_that_sum_to_one(toy, make_classifier, reader_tokenizer):
    model = make_classifier(1)
    prompt = toy.prompts[1]
    positive, negative = (
        ClassifierLikelihood(model, label, reader_tokenizer).log_likelihood(*rows(toy, prompt)) for label in (1, 0)
    )
    expected = logits_of(model, reader_tokenizer, prompt, toy.completions)[:, 0]
    assert expected.std() > 0.1
    assert_close(positive.exp(), 1 / (1 + torch.exp(-expected)))
    assert_close(positive.exp() + negative.exp(), torch.ones(len(toy.completions)))


@pytest.mark.parametrize("problem_type", [None, "single_label_classification", "multi_label_classification"])
def test_several_logits(toy, problem_type, make_classifier, reader_tokenizer):
    model = make_classifier(3, problem_type=problem_type, **NAMED)
    prompt = toy.prompts[2]
    logits = logits_of(model, reader_tokenizer, prompt, toy.completions)  # (N, L)
    odds = logits.exp()
    expected = odds / (1 + odds) if problem_type == "multi_label_classification" else odds / odds.sum(-1, keepdim=True)
    for label, name in enumerate(("bad", "so-so", "good")):
        by_index, by_name = (
            ClassifierLikelihood(model, which, reader_tokenizer).log_likelihood(*rows(toy, prompt))
            for which in (label, name)
        )
        assert_close(by_index.exp(), expected[:, label])
        assert torch.equal(by_index, by_name)


def test_the_posterior_is_the_prior_given_the_answer(toy, make_classifier, reader_tokenizer):
    """Bayes by enumeration: draw a text, ask the reader, keep the texts with the answer."""
    model = make_classifier(2)
    likelihood = ClassifierLikelihood(model, 1, reader_tokenizer)
    assert isinstance(likelihood, Likelihood)
    prior = LanguageModel(toy.model, toy.tokenizer, max_completion_length=toy.max_completion_length)
    posterior = Posterior(prior, likelihood)
    assert posterior.beta is None
    check_posterior(posterior, toy.prompts, enumerable=toy)
    for row, prompt in enumerate(toy.prompts):
        logits = logits_of(model, reader_tokenizer, prompt, toy.completions)
        joint = toy.log_prior[row].exp()[:, None] * logits.softmax(-1)  # (N, answers)
        log_density = posterior.log_density(*rows(toy, prompt))
        assert_close(log_density.logsumexp(-1).exp(), joint[:, 1].sum(), rtol=1e-4, atol=0)
        assert_close(log_density.softmax(-1), joint[:, 1] / joint[:, 1].sum(), rtol=1e-3, atol=1e-5)


def test_never_above_its_bound(toy, make_classifier, reader_tokenizer):
    model = make_classifier(1)
    with torch.no_grad():
        model.score.weight *= 1000.0
    for label in (0, 1):
        likelihood = ClassifierLikelihood(model, label, reader_tokenizer)
        assert likelihood.bound == 0.0
        evidence = likelihood.log_likelihood(*rows(toy, toy.prompts[0]))
        assert (evidence <= likelihood.bound).all()
        # in log space: what fp32 would round to probability 0 keeps its order
        assert evidence.isfinite().all()
        assert evidence.min() < math.log(torch.finfo(torch.float32).tiny)


def test_from_a_path(tmp_path, make_classifier, reader_tokenizer):
    model = make_classifier(3, **NAMED)
    model.save_pretrained(tmp_path)
    reader_tokenizer.save_pretrained(tmp_path)
    loaded = ClassifierLikelihood(str(tmp_path), "good").log_likelihood(["a"], ["b"])
    assert_close(loaded, ClassifierLikelihood(model, 2, reader_tokenizer).log_likelihood(["a"], ["b"]))


@pytest.mark.parametrize(
    ("num_labels", "label", "error", "message"),
    [
        (1, 2, ValueError, "between 0 and 1 for a classifier with 1 logit, got 2"),
        (3, 3, ValueError, "between 0 and 2 for a classifier with 3 logits, got 3"),
        (3, -1, ValueError, "got -1"),
        (3, "great", ValueError, r"`config.label2id` \('LABEL_0', 'LABEL_1', 'LABEL_2'\) or an index, got 'great'"),
        (1, "LABEL_0", ValueError, "none with one logit"),
        (3, True, TypeError, "got True of type bool"),
        (3, 1.0, TypeError, "got 1.0 of type float"),
    ],
)
def test_labels_that_are_not_there(num_labels, label, error, message, make_classifier, reader_tokenizer):
    with pytest.raises(error, match=message):
        ClassifierLikelihood(make_classifier(num_labels), label, reader_tokenizer)


def test_a_regression_is_a_reward(make_classifier, reader_tokenizer):
    with pytest.raises(ValueError, match=r"is 'regression'\. Use it as a reward: `RewardLikelihood"):
        ClassifierLikelihood(make_classifier(1, problem_type="regression"), 1, reader_tokenizer)


def test_a_reward_model_is_no_probability(tmp_path, make_classifier, reader_tokenizer):
    make_classifier(1).save_pretrained(tmp_path)
    reader_tokenizer.save_pretrained(tmp_path)
    RewardIndex("single").save(tmp_path)
    with pytest.raises(ValueError, match=r"learnt from comparisons.*`RewardLikelihood\(model, beta\)`"):
        ClassifierLikelihood(tmp_path, 1)
