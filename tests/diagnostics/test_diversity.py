"""Repetition within and between texts, by hand and against sacrebleu."""

import math
import random

import pytest
from sacrebleu import sentence_bleu

from rlhf_bayes.diagnostics import distinct_n, duplicates, repeated_ngrams, self_bleu
from rlhf_bayes.diagnostics.diversity import words


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


@pytest.mark.parametrize(
    "text", ["Yes.", "a", "", "今天天气很好。", "สวัสดี", "It was good, and it was cheap.", "a a a a a a"]
)
def test_self_bleu_of_the_same_text_is_one(text):
    assert self_bleu([text] * 8) == pytest.approx(1.0)


def test_self_bleu_by_hand():
    assert self_bleu(["a b", "c d"]) == 0.0
    assert math.isnan(self_bleu(["a b c"]))
    # a word said twice counts as often as one other text says it, even if both texts together say it twice;
    # of the pairs, none matches, which is smoothed to half a match
    assert self_bleu(["a a", "a b", "a c"]) == pytest.approx(math.sqrt(1 / 2 * 1 / 2))
    assert self_bleu(["a b", ""]) == 0.0


def random_texts(vocabulary, generator):
    return [" ".join(generator.choices(vocabulary, k=generator.randint(1, 12))) for _ in range(15)]


def test_self_bleu_is_that_of_sacrebleu():
    generator = random.Random(0)
    for vocabulary in (["a", "b."], ["a", "b", "it's", "one,", "(two)"], list("abcdefghij")):
        texts = random_texts(vocabulary, generator)
        expected = [sentence_bleu(text, texts[:row] + texts[row + 1 :]).score for row, text in enumerate(texts)]
        assert self_bleu(texts) == pytest.approx(sum(expected) / len(texts) / 100)


def test_self_bleu_of_a_script_without_spaces_is_that_of_sacrebleu():
    generator = random.Random(1)
    texts = ["".join(generator.choices("今天气很好不坏我", k=generator.randint(1, 12))) for _ in range(12)]
    expected = [
        sentence_bleu(text, texts[:row] + texts[row + 1 :], tokenize="zh").score for row, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(texts) / 100)
    assert 0 < self_bleu(texts) < 1


def test_scripts_without_spaces_have_words_too():
    assert words("今天 好") == ["今", "天", "好"]
    assert words("ok 今天") == ["ok", "今", "天"]
    assert words("Yes. No") == ["Yes.", "No"]


def joined_self_bleu(texts):
    return self_bleu([" ".join(text) for text in texts])


def test_collapse_is_seen():
    generator = random.Random(0)
    diverse = [generator.choices("abcdefghij", k=8) for _ in range(20)]
    collapsed = [generator.choice(diverse[:2]) for _ in range(20)]
    for measure, grows in ((lambda texts: distinct_n(texts, 2), False), (joined_self_bleu, True), (duplicates, True)):
        assert (measure(collapsed) > measure(diverse)) == grows
