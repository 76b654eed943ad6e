"""Repetition within and between texts, by hand and, where installed, against nltk."""

import math
import random

import pytest

from rlhf_bayes.diagnostics import distinct_n, duplicates, repeated_ngrams, self_bleu


def split(*texts):
    return [text.split() for text in texts]


def test_distinct_n():
    assert distinct_n(split("a b c", "a b"), 2) == pytest.approx(2 / 3)
    assert distinct_n(split("a b c", "a b"), 1) == pytest.approx(3 / 5)
    assert distinct_n(split("", "word"), 2) == 0.0


def test_repeated_ngrams():
    assert repeated_ngrams(split("a b a b a b"), 2) == pytest.approx(3 / 5)
    assert repeated_ngrams(split("a b c d", "a a a a"), 1) == pytest.approx((0 + 3 / 4) / 2)
    assert repeated_ngrams(split("too short"), 4) == 0.0


def test_duplicates():
    assert duplicates(split("a b", "a b", "a", "a b")) == pytest.approx(0.5)
    assert duplicates([[1, 2], [2, 1]]) == 0.0


def test_self_bleu_by_hand():
    assert self_bleu(split("a b c d", "a b c d", "a b c d")) == pytest.approx(1.0)
    assert self_bleu(split("a b", "c d")) == 0.0
    assert math.isnan(self_bleu(split("a b c")))
    # "a b" has both words and its pair in "a b c", which is longer; "a b c" has 2 of 3 words and 1 of 2 pairs
    short, long = math.exp(1 - 3 / 2), math.sqrt(2 / 3 * 1 / 2)
    assert self_bleu(split("a b", "a b c"), max_n=2) == pytest.approx((short + long) / 2)
    # a word said twice counts as often as one other text says it, even if both texts together say it twice
    clipped = self_bleu([["a", "a"], ["a", "b"], ["a", "c"]], max_n=1)
    assert clipped == pytest.approx((1 / 2 + 1 / 2 + 1 / 2) / 3)


def test_self_bleu_is_that_of_nltk():
    bleu_score = pytest.importorskip("nltk.translate.bleu_score", reason="nltk is not installed")
    smoothing = bleu_score.SmoothingFunction().method1
    generator = random.Random(0)
    for vocabulary in ("abc", "abcdef", "abcdefghij"):
        texts = [generator.choices(vocabulary, k=generator.randint(1, 12)) for _ in range(15)]
        expected = [
            bleu_score.sentence_bleu(texts[:row] + texts[row + 1 :], text, smoothing_function=smoothing)
            for row, text in enumerate(texts)
        ]
        assert self_bleu(texts) == pytest.approx(sum(expected) / len(texts))


def test_collapse_is_seen():
    generator = random.Random(0)
    diverse = [generator.choices("abcdefghij", k=8) for _ in range(20)]
    collapsed = [generator.choice(diverse[:2]) for _ in range(20)]
    for measure, grows in ((lambda texts: distinct_n(texts, 2), False), (self_bleu, True), (duplicates, True)):
        assert (measure(collapsed) > measure(diverse)) == grows
