"""What rows of preference data say, and what is refused or reported."""

import logging

import pytest
from datasets import Dataset, IterableDataset

from rlhf_bayes.rewards import check_pairs, read_judgement

WARNINGS = "rlhf_bayes.rewards.judgement"


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
        ({"votes": {"chosen": None, "rejected": 1, "tie": 2}}, 1 / 3, [0, 1, 2], None, None),
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
        ({"votes": None}, "at least one in all, got None in row 5"),
        ({"votes": {"chosen": 3, "rejected": 1, "ties": 5}}, "'chosen', 'rejected' and 'tie', got 'ties' in row 5"),
        ({"annotators": ["w"], "annotator_votes": None}, "of equal length and not empty"),
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
        (pairs(margin=[0.5, None, 1.0]), ValueError, "`margin` must be a finite number, got None in .* row 1"),
        (pairs(margin=[0.5, 1.0, float("nan")]), ValueError, "`margin` must be a finite number, got nan in .* row 2"),
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


def test_pairs_of_tokens_are_looked_at_too(caplog):
    with caplog.at_level(logging.WARNING, WARNINGS):
        check_pairs("train_dataset", Dataset.from_dict({"chosen_ids": [[1], [2]], "rejected_ids": [[1], [1, 2]]}))
    assert "1 of 2 pairs in `train_dataset` have identical texts" in caplog.text
    assert "row['chosen_ids'] != row['rejected_ids']" in caplog.text
    with pytest.raises(ValueError, match="at least one token a text, got none in 1 of 2 pairs"):
        check_pairs("train_dataset", Dataset.from_dict({"chosen_ids": [[1], []], "rejected_ids": [[2], [1]]}))
