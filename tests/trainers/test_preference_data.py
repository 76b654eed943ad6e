"""What rows of preference data say, and what is refused or reported."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from rlhf_bayes.trainers.preference_data import (
    PairCollator,
    PairReader,
    annotators_in,
    check_pairs,
    fit_length,
    read_judgement,
)

WARNINGS = "rlhf_bayes.trainers.preference_data"


def pairs(**columns):
    count = len(next(iter(columns.values()))) if columns else 3
    texts = {"chosen": [f"good {i}" for i in range(count)], "rejected": [f"bad {i}" for i in range(count)]}
    return Dataset.from_dict(texts | columns)


@pytest.mark.parametrize(
    ("row", "prob", "votes", "annotators", "labels"),
    [
        ({}, 1.0, None, None, None),
        ({"chosen_prob": 0.7}, 0.7, None, None, None),
        ({"chosen_prob": 1}, 1.0, None, None, None),
        ({"votes": [3, 1, 0]}, 0.75, [3, 1, 0], None, None),
        ({"votes": [3, 1]}, 0.75, [3, 1, 0], None, None),
        ({"votes": {"rejected": 1, "tie": 2}}, 1 / 3, [0, 1, 2], None, None),
        ({"annotator": 7}, 1.0, None, ["7"], [1.0]),
        ({"annotator": "w", "chosen_prob": 0.0}, 0.0, None, ["w"], [0.0]),
        (
            {"annotators": ["u", "v", "w"], "annotator_votes": ["rejected", "tie", "rejected"], "votes": [0, 2, 1]},
            1 / 6,
            [0, 2, 1],
            ["u", "v", "w"],
            [0.0, 0.5, 0.0],
        ),
    ],
)
def test_judgements(row, prob, votes, annotators, labels):
    judgement = read_judgement(row, "row 0")
    assert judgement.chosen_prob == pytest.approx(prob)
    assert judgement[1:] == (votes, annotators, labels)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen_prob": 1.2}, r"`chosen_prob` must be a number in \[0, 1\], got 1\.2 in row 5"),
        ({"chosen_prob": float("nan")}, r"in \[0, 1\], got nan in row 5"),
        ({"chosen_prob": None}, "got None in row 5"),
        ({"votes": [1, -1, 0]}, r"at least one in all, got \[1, -1, 0\] in row 5"),
        ({"votes": [0, 0, 0]}, r"got \[0, 0, 0\] in row 5. Drop pairs that nobody judged"),
        ({"votes": [1, 1, 1, 1]}, "`votes` must count"),
        ({"votes": [0.5, 0.5, 0]}, "`votes` must count"),
        ({"chosen_prob": 0.5, "votes": [1, 1, 0]}, "got `chosen_prob` and votes"),
        ({"annotator": None}, "`annotator` must be an id, got None in row 5"),
        ({"annotators": ["w"], "annotator_votes": ["chosen", "tie"]}, "of equal length and not empty"),
        ({"annotator_votes": ["chosen"]}, "got None and"),
        ({"annotators": [], "annotator_votes": []}, "of equal length and not empty"),
        ({"annotators": ["w"], "annotator_votes": ["a1"]}, "must hold 'chosen', 'rejected' or 'tie', got 'a1'"),
        ({"annotators": ["w"], "annotator_votes": ["tie"], "votes": [1, 0, 0]}, "must be the counts"),
    ],
)
def test_bad_judgements(row, message):
    with pytest.raises(ValueError, match=message):
        read_judgement(row, "row 5")


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (
            Dataset.from_dict({"good": ["a"], "bad": ["b"]}),
            ValueError,
            r"the columns `chosen` and `rejected`, got \['go",
        ),
        (pairs().select([]), ValueError, "at least one pair, got none"),
        (
            pairs(rejected=["x", None, "y"]),
            TypeError,
            "`rejected` must hold texts .* got None in `train_dataset` row 1",
        ),
        (pairs(chosen=["a", "b"], rejected=["a", "b"]), ValueError, "at least one pair of different texts, got 2"),
        (pairs(votes=[[1, 1, 0], [0, 0, 3]]), ValueError, "at least one pair that is not a tie, got 2 ties"),
        (pairs(chosen_prob=[0.5, 0.2, -0.1]), ValueError, "got -0.1 in `train_dataset` row 2"),
        ({"held": pairs().select([])}, ValueError, r"`train_dataset\['held'\]` must hold at least one pair"),
    ],
)
def test_data_that_nothing_can_be_learnt_from(dataset, error, message):
    with pytest.raises(error, match=message):
        check_pairs("train_dataset", dataset)


def test_odd_pairs_are_counted(caplog):
    with caplog.at_level(logging.WARNING, WARNINGS):
        check_pairs("train_dataset", pairs(chosen=["a", "b", ""], rejected=["a", "c", "d"]))
    identical, empty = (record.message for record in caplog.records)
    assert identical.startswith("1 of 3 pairs in `train_dataset` have identical texts. They are kept")
    assert empty.startswith("1 of 3 pairs in `train_dataset` have an empty text. They are kept")
    check_pairs("eval_dataset", Dataset.from_dict({"chosen_ids": [[1]], "rejected_ids": [[2]]}))
    check_pairs("train_dataset", IterableDataset.from_generator(lambda: iter([{"chosen": "a", "rejected": "b"}])))


TOKENS = Dataset.from_dict(
    {"chosen_ids": [[1, 2], [1, 2, 3, 4], [5]], "rejected_ids": [[3], [4], [6, 7, 8]], "margin": [0.1, 0.2, 0.3]}
)


def test_long_pairs_are_dropped_and_counted(caplog):
    with caplog.at_level(logging.WARNING, WARNINGS):
        assert fit_length(TOKENS, "train", 2, "drop").to_list() == [TOKENS[0]]
    assert "2 of 3 pairs in `train` have a text of more than `max_length` = 2 tokens: they are dropped" in caplog.text


def test_long_pairs_keep_their_end(caplog):
    with caplog.at_level(logging.WARNING, WARNINGS):
        truncated = fit_length(TOKENS, "train", 2, "truncate").to_list()
    assert [row["chosen_ids"] for row in truncated] == [[1, 2], [3, 4], [5]]
    assert [row["rejected_ids"] for row in truncated] == [[3], [4], [7, 8]]
    assert "2 of 3 pairs" in caplog.text
    assert "the last 2 tokens are kept" in caplog.text


def test_long_pairs_may_stop_the_run():
    with pytest.raises(ValueError, match=r"2 of 3 pairs in `train` .* Raise `max_length`"):
        fit_length(TOKENS, "train", 2, "error")
    with pytest.raises(ValueError, match=r"1 of 1 pairs in `train` .* none is left"):
        fit_length(TOKENS.select([1]), "train", 2, "drop")


def test_pairs_that_fit_are_left_alone(caplog):
    assert fit_length(TOKENS, "train", None, "error") is TOKENS
    assert fit_length(TOKENS, "train", 4, "error") is TOKENS
    assert not caplog.records


@pytest.mark.parametrize(("overlong", "expected"), [("drop", [[1, 2]]), ("truncate", [[1, 2], [3, 4], [5]])])
def test_long_pairs_of_a_stream(overlong, expected):
    stream = fit_length(TOKENS.to_iterable_dataset(), "train", 2, overlong)
    assert [row["chosen_ids"] for row in stream] == expected


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
