import math
import warnings

import numpy as np
import pytest
import torch

from rlhf_bayes.diagnostics.bag_of_words import LENGTH, BagOfWords

CHOSEN = ["A red fox runs.", "the red red house", "blue sky above", "a dog, a cat", "red again and again"]
REJECTED = ["the blue house", "a red fox", "A red fox runs.", "sky sky", "the dog runs above"]
PROB = [0.9, 0.3, 0.5, 1.0, 0.65]


def test_one_repeated_pair_recovers_the_share_of_votes():
    """With hardly any prior, σ(Δ) = p for every pair that can be told apart."""
    fitted = BagOfWords.fit(["good"] * 40, ["bad"] * 40, [0.7] * 40, l2=1e-6, min_count=1)
    delta = fitted.rewards(["good"]) - fitted.rewards(["bad"])
    assert delta.item() == pytest.approx(math.log(0.7 / 0.3), abs=1e-4)
    # the one feature that both sides share carries nothing
    assert fitted.weights[LENGTH] == 0


def test_votes_count_as_pairs():
    """A pair with 3 of 4 votes is four pairs, one of them the other way round, at four times the prior's precision."""
    votes = [4, 1, 2, 3, 3]  # of 4
    soft = BagOfWords.fit(CHOSEN, REJECTED, [v / 4 for v in votes], l2=0.5)
    chosen = [c if n < v else r for c, r, v in zip(CHOSEN, REJECTED, votes, strict=True) for n in range(4)]
    rejected = [r if n < v else c for c, r, v in zip(CHOSEN, REJECTED, votes, strict=True) for n in range(4)]
    hard = BagOfWords.fit(chosen, rejected, l2=2.0)
    assert soft.weights == pytest.approx({term: hard.weights[term] for term in soft.weights}, abs=1e-4)


@pytest.mark.parametrize("bigrams", [False, True])
def test_newton_steps_find_the_same_weights(bigrams):
    fitted = BagOfWords.fit(CHOSEN, REJECTED, PROB, l2=0.3, min_count=1, bigrams=bigrams)
    terms = list(fitted.weights)

    def features(text: str) -> list[float]:
        words = text.lower().replace(".", " .").replace(",", " ,").split()
        padded = " " + " ".join(words) + " "
        starts = [padded[i:] for i in range(len(padded))]
        counts = [sum(start.startswith(f" {term} ") for start in starts) for term in terms if term != LENGTH]
        return np.log1p([len(words), *counts])

    difference = np.array([features(c) - features(r) for c, r in zip(CHOSEN, REJECTED, strict=True)])  # (N, V)
    theta = np.zeros(len(terms))
    for _ in range(50):
        prob = 1 / (1 + np.exp(-difference @ theta))
        gradient = difference.T @ (prob - PROB) + 0.3 * theta
        hessian = (difference * (prob * (1 - prob))[:, None]).T @ difference + 0.3 * np.eye(len(terms))
        theta -= np.linalg.solve(hessian, gradient)
    assert list(fitted.weights.values()) == pytest.approx(theta.tolist(), abs=1e-4)
    assert any(" " in term and term != LENGTH for term in terms) == bigrams


def test_rare_words_are_left_out_and_repeats_do_not_make_them_common():
    fitted = BagOfWords.fit(CHOSEN * 3, REJECTED * 3, min_count=2)
    assert {"house", "red", "dog", "above"} < set(fitted.weights)
    assert not {"cat", "and", "again"} & set(fitted.weights)
    assert set(BagOfWords.fit(CHOSEN, REJECTED, max_words=1).weights) == {LENGTH, "red"}
    assert set(BagOfWords.fit(CHOSEN, REJECTED, max_words=0).weights) == {LENGTH}


def test_rewards_of_unknown_words_differ_by_their_number_alone():
    fitted = BagOfWords({LENGTH: 2.0, "good": 1.0})
    expected = [2 * math.log(3), 2 * math.log(3) + math.log(2), 2 * math.log(3) + math.log(3), 0.0]
    torch.testing.assert_close(fitted.rewards(["not known", "GOOD thing", "good good", ""]), torch.tensor(expected))


def test_it_is_a_reward_function():
    fitted = BagOfWords.fit(CHOSEN, REJECTED, PROB)
    chats = [[{"role": "assistant", "content": text}] for text in CHOSEN]
    assert fitted(prompts=["?"] * 5, completions=CHOSEN, completion_ids=[[1]] * 5) == fitted.rewards(CHOSEN).tolist()
    assert fitted(prompts=["?"] * 5, completions=chats) == fitted.rewards(CHOSEN).tolist()
    assert fitted.__name__ == "bag_of_words"


def test_strongest_terms_come_first():
    assert BagOfWords({LENGTH: 0.1, "a": -2.0, "b": 1.0}).strongest(2) == [("a", -2.0), ("b", 1.0)]


def test_a_fit_converges_on_pairs_that_words_decide():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = BagOfWords.fit(["good"] * 500, ["bad"] * 500, l2=0.01, min_count=1)
    assert fitted.rewards(["good"]) > fitted.rewards(["bad"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"chosen": [], "rejected": []}, "at least one pair; got 0 and 0"),
        ({"chosen": ["a", "b"], "rejected": ["a"]}, "got 2 and 1"),
        ({"chosen": ["a"], "rejected": ["b"], "chosen_prob": [1.5]}, r"in \[0, 1\], got 1.5"),
        ({"chosen": ["a"], "rejected": ["b"], "chosen_prob": [math.nan]}, r"in \[0, 1\], got nan"),
        (
            {"chosen": ["a"], "rejected": ["b"], "chosen_prob": [0.5, 0.5]},
            r"one number per pair, 1; got the shape \(2,\)",
        ),
        ({"chosen": ["a"], "rejected": ["b"], "l2": 0}, "`l2` must be positive, got 0"),
    ],
)
def test_bad_input_is_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        BagOfWords.fit(**columns)
