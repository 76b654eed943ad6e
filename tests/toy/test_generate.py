"""The grammar: the same seed, the same reviews; sentiment balanced, varied, and read off the text by another route."""

import math
import statistics

import pytest

from rlhf_bayes.toy.generate import write_reviews
from rlhf_bayes.toy.rewards import sentiment


@pytest.fixture(scope="module")
def reviews():
    return list(write_reviews(4_000, seed=7))


def test_the_seed_decides():
    assert list(write_reviews(50, seed=3)) == list(write_reviews(50, seed=3))
    assert list(write_reviews(50, seed=3)) != list(write_reviews(50, seed=4))


def test_the_first_review_of_seed_0_stays(reviews):
    # the bundled model was trained on this grammar: a change here asks for another model
    (first,) = write_reviews(1, seed=0)
    assert first.text == "The city tour made the children happy, and it was absolutely beautiful."
    assert first.sentiment == pytest.approx(math.tanh((2.0 + 1.25 * 2.5) / 3))


def test_one_sentence_each_and_hardly_a_repetition(reviews):
    texts = [review.text for review in reviews]
    assert all(text[0].isupper() and text.endswith(".") and text.count(".") == 1 for text in texts)
    assert not any("  " in text or " ," in text for text in texts)
    assert len(set(texts)) > 0.95 * len(texts)


def test_sentiment_is_balanced(reviews):
    values = [review.sentiment for review in reviews]
    standard_error = statistics.stdev(values) / len(values) ** 0.5
    assert abs(statistics.mean(values)) < 5 * standard_error
    assert statistics.stdev(values) > 0.5
    assert all(-1 < value < 1 for value in values)


def test_the_gold_sentiment_is_what_the_text_says(reviews):
    read = [sentiment(review.text) for review in reviews]
    assert read == pytest.approx([review.sentiment for review in reviews])
