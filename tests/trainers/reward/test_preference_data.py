"""Lengths, bootstrap weights and tensors of preference data."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset

from rlhf_bayes.rewards.lengths import LengthLimit
from rlhf_bayes.trainers.reward.preference_data import (
    PairCollator,
    PairReader,
    annotators_in,
    fit_length,
)

WARNINGS = "rlhf_bayes"


def pairs(**columns):
    count = len(next(iter(columns.values()))) if columns else 3
    texts = {"chosen": [f"good {i}" for i in range(count)], "rejected": [f"bad {i}" for i in range(count)]}
    return Dataset.from_dict(texts | columns)


TOKENS = Dataset.from_dict(
    {"chosen_ids": [[1, 2], [1, 2, 3, 4], [5]], "rejected_ids": [[3], [4], [6, 7, 8]], "margin": [0.1, 0.2, 0.3]}
)


def test_long_pairs_are_dropped_and_counted(caplog):
    with caplog.at_level(logging.WARNING, WARNINGS):
        assert fit_length(TOKENS, "train", LengthLimit(2), "drop").to_list() == [TOKENS[0]]
    assert (
        "2 of 3 pairs in `train` have a text of more than `max_length` = 2 tokens: rows 1, 2. They are dropped"
        in caplog.text
    )


def test_long_pairs_keep_their_end(caplog):
    with caplog.at_level(logging.WARNING, WARNINGS):
        truncated = fit_length(TOKENS, "train", LengthLimit(2), "truncate").to_list()
    assert [row["chosen_ids"] for row in truncated] == [[1, 2], [3, 4], [5]]
    assert [row["rejected_ids"] for row in truncated] == [[3], [4], [7, 8]]
    assert "2 of 3 pairs" in caplog.text
    assert "The last 2 tokens are kept" in caplog.text


def test_long_pairs_may_stop_the_run():
    with pytest.raises(ValueError, match=r"2 of 3 pairs in `train` .* Raise `max_length`"):
        fit_length(TOKENS, "train", LengthLimit(2), "error")
    with pytest.raises(ValueError, match=r"1 of 1 pairs in `train` .* none is left"):
        fit_length(TOKENS.select([1]), "train", LengthLimit(2), "drop")


def test_pairs_that_fit_are_left_alone(caplog):
    assert fit_length(TOKENS, "train", LengthLimit(None), "error") is TOKENS
    assert fit_length(TOKENS, "train", LengthLimit(4), "error") is TOKENS
    assert not caplog.records


@pytest.mark.parametrize(("overlong", "expected"), [("drop", [[1, 2]]), ("truncate", [[1, 2], [3, 4], [5]])])
def test_long_pairs_of_a_stream(overlong, expected):
    stream = fit_length(TOKENS.to_iterable_dataset(), "train", LengthLimit(2), overlong)
    assert [row["chosen_ids"] for row in stream] == expected


def test_long_pairs_of_a_stream_are_not_dropped_without_a_word(caplog):
    stream = fit_length(TOKENS.to_iterable_dataset(), "train", LengthLimit(2), "error")
    with pytest.raises(
        ValueError, match="A pair in `train`, row 1, has a text of 4 tokens, more than `max_length` = 2"
    ):
        list(stream)
    with caplog.at_level(logging.WARNING, WARNINGS):
        fit_length(TOKENS.to_iterable_dataset(), "train", LengthLimit(2), "drop")
    assert "dropped without being counted" in caplog.text


def test_bootstrap_weights_are_poisson_and_belong_to_the_row():
    reader = PairReader("train_dataset", None, 3, seed=4)
    weights = np.array([reader({}, index)["pair_weights"] for index in range(4000)])  # (N, K)
    # of the mean of N Poisson(1) draws; of their variance, √((μ4 − σ⁴)/N) with μ4 = 4
    assert np.abs(weights.mean(0) - 1).max() < 4 / np.sqrt(4000)
    assert np.abs(weights.var(0) - 1).max() < 4 * np.sqrt(3 / 4000)
    correlation = np.corrcoef(weights.T)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < 4 / np.sqrt(4000)
    assert reader({}, 17) == PairReader("again", None, 3, seed=4)({}, 17)
    assert (weights != [PairReader("other", None, 3, seed=5)({}, i)["pair_weights"] for i in range(4000)]).any()


def test_annotators_are_found_and_numbered():
    data = pairs(
        annotators=[["x", "a"], ["x"], ["b", "x"]], annotator_votes=[["tie"] * 2, ["chosen"], ["rejected"] * 2]
    )
    assert annotators_in(data) == (["a", "b", "x"], 5)
    reader = PairReader("train_dataset", {"a": 0, "b": 1, "x": 2}, 1, seed=0)
    assert reader(data[2], 2) == {
        "pair_prob": 0.0, "pair_votes": [0, 2, 0], "pair_annotators": [1, 2], "pair_labels": [0.0, 0.0],
    }  # fmt: skip


def test_the_collator_adds_columns_to_those_of_another():
    rows = [
        {"chosen_ids": [1], "pair_prob": 0.5, "pair_annotators": [2], "pair_labels": [1.0], "pair_votes": [1, 1, 0]},
        {"chosen_ids": [2], "pair_prob": 1.0, "pair_annotators": [0, 1], "pair_labels": [0.0, 0.5],
         "pair_votes": [1, 0, 0]},
    ]  # fmt: skip
    seen = []

    def collate(rows):
        seen.extend(rows)
        return {"input_ids": torch.tensor([row["chosen_ids"] for row in rows])}

    batch = PairCollator(collate)(rows)
    assert seen == [{"chosen_ids": [1]}, {"chosen_ids": [2]}]
    assert batch["input_ids"].tolist() == [[1], [2]]
    assert batch["pair_prob"].tolist() == [0.5, 1.0]
    assert batch["pair_annotators"].tolist() == [[2, -1], [0, 1]]
    assert batch["pair_labels"].tolist() == [[1.0, 0.5], [0.0, 0.5]]
    assert batch["pair_votes"].dtype == torch.float
    assert rows[0]["pair_prob"] == 0.5


def test_pairs_that_truncation_makes_identical_are_counted(caplog):
    same_end = Dataset.from_dict(
        {"chosen_ids": [[1, 8, 9], [1, 2], [3, 4, 5]], "rejected_ids": [[2, 8, 9], [3, 4], [3, 4, 6]]}
    )
    with caplog.at_level(logging.WARNING, "rlhf_bayes.rewards.lengths"):
        fit_length(same_end, "train", LengthLimit(2), "truncate")
    assert "1 of 3 pairs in `train` have the same last 2 tokens in both texts" in caplog.text
    assert "cuts off where they differ: row 0" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 1 pairs in `train` have the same last 2 tokens.*Nothing follows"):
        fit_length(same_end.select([0]), "train", LengthLimit(2), "truncate")


@pytest.mark.parametrize("overlong", ["drop", "truncate", "error"])
def test_the_positions_of_the_model_are_a_limit_too(overlong, caplog):
    limit = LengthLimit(1024, 2)
    if overlong == "error":
        with pytest.raises(ValueError, match=r"more than the model's 2 positions: rows 1, 2\. Take a model with more"):
            fit_length(TOKENS, "train", limit, overlong)
        return
    with caplog.at_level(logging.WARNING, "rlhf_bayes.rewards.lengths"):
        fitting = fit_length(TOKENS, "train", limit, overlong)
    assert len(fitting) == (1 if overlong == "drop" else 3)
    assert max(len(ids) for ids in fitting["chosen_ids"]) <= 2
    assert "2 of 3 pairs in `train` have a text of more than the model's 2 positions: rows 1, 2" in caplog.text
