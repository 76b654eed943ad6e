"""Completions regrown from a prefix: given it, drawn as the model draws; the model's context; chats."""

import pytest
import torch
from scipy.stats import chisquare

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.lm.continuation import regrow

from .families import tiny_model, tiny_tokenizer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_given_the_prefix_the_rest_is_drawn_by_the_model(toy):
    """By enumeration: π(x | prompt, x_<i), for prompts and prefixes of different lengths in one batch."""
    lm = LanguageModel(toy.model, toy.tokenizer, 3, batch_size=700)
    cases = [(0, []), (1, [0]), (2, [1, 0]), (2, [])]
    n = 500
    prompts = [toy.prompts[p] for p, _ in cases for _ in range(n)]
    prefixes = [prefix for _, prefix in cases for _ in range(n)]
    completions = regrow(lm, prompts, prefixes, seeded())
    for case, (prompt, prefix) in enumerate(cases):
        begins = torch.tensor([ids[: len(prefix)] == prefix for ids in toy.completion_ids])
        p = toy.log_prior[prompt].masked_fill(~begins, -torch.inf).softmax(-1).double() * n
        counts = torch.zeros(len(p), dtype=torch.float64)
        for ids in completions[case * n : (case + 1) * n]:
            counts[toy.completion_ids.index(ids)] += 1
        assert counts[~begins].sum() == 0
        large = p >= 5
        observed = [*counts[large].tolist(), float(counts[~large].sum())]
        expected = [*p[large].tolist(), float(p[~large].sum())]
        if expected[-1] < 1e-9:
            observed, expected = observed[:-1], expected[:-1]
        assert chisquare(observed, [e * n / sum(expected) for e in expected]).pvalue > 0.001 / len(cases)


def test_a_row_with_a_long_prefix_does_not_run_out_of_positions():
    """Prompts that just fit, with long and short prefixes: rows are run apart where together they would not fit."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    assert model.config.n_positions == 64
    lm = LanguageModel(model, tokenizer, max_completion_length=40)
    prompts = ["abcdefghijklmnopabcdefgh", "ab", "ab"]  # 24 tokens: 24 + 40 = 64
    prefixes = [[1] * 30, [], [2] * 39]
    completions = regrow(lm, prompts, prefixes, seeded())
    assert [ids[: len(prefix)] for ids, prefix in zip(completions, prefixes, strict=True)] == prefixes
    assert all(len(ids) <= 40 for ids in completions)
    lm.log_prob(prompts, completions)  # members of the support
    assert regrow(lm, prompts, prefixes, seeded()) == completions


def test_chats(toy):
    lm = LanguageModel(toy.model, toy.tokenizer, 3)
    chat = [{"role": "user", "content": "a b"}]
    assert regrow(lm, [chat] * 3, [[0]] * 3, seeded(2)) == regrow(lm, ["a b"] * 3, [[0]] * 3, seeded(2))


def test_a_prompt_that_does_not_fit():
    lm = LanguageModel(tiny_model("gpt2"), tiny_tokenizer(), max_completion_length=40)
    with pytest.raises(ValueError, match="must fit the model's context"):
        regrow(lm, ["a" * 30], [[]])
