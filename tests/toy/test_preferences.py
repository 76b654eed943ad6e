"""The bundled preferences: what is in the files, and that the annotators vote as they say."""

import gzip
import json
import math
import random
from collections import Counter

import pytest

from rlhf_bayes import toy
from rlhf_bayes.toy import annotate
from rlhf_bayes.toy.annotate import Pair
from rlhf_bayes.toy.rewards import sentiment

SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def splits():
    return {split: toy.preferences(split).to_list() for split in SPLITS}


def gold_difference(row) -> float:
    return sentiment(row["chosen"]) - sentiment(row["rejected"])


def near(share: float, expected: float, count: int) -> None:
    off = (share - expected) / math.sqrt(expected * (1 - expected) / count)
    assert abs(off) < 4, f"{share:.3f} against {expected:.3f}: off by {off:.1f} standard errors"


def test_columns_and_sizes(splits):
    dataset = toy.preferences()
    assert dataset.column_names == ["prompt", "chosen", "rejected", "annotators", "annotator_votes", "votes"]
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3_008, "test": 608}
    assert sum(toy.preferences_path(split).stat().st_size for split in SPLITS) < 300_000


@pytest.mark.parametrize("split", SPLITS)
def test_every_prompt_is_there_equally_often_in_random_order(splits, split):
    rows = splits[split]
    counts = Counter(row["prompt"] for row in rows)
    assert set(counts) == set(toy.prompts())
    assert set(counts.values()) == {annotate.PAIRS_A_PROMPT[split]}
    assert len({row["prompt"] for row in rows[:100]}) > 25


def test_no_completion_comes_twice_for_its_prompt(splits):
    texts = [
        (row["prompt"], row[side]) for split in SPLITS for row in splits[split] for side in ("chosen", "rejected")
    ]
    assert len(set(texts)) == len(texts)
    assert all(text.strip() for _, text in texts)


@pytest.mark.parametrize("split", SPLITS)
def test_votes_are_the_counts_and_chosen_the_plurality(splits, split):
    for row in splits[split]:
        assert row["annotators"] == ["careful", "average", "careless"]
        counts = Counter(row["annotator_votes"])
        assert row["votes"] == [counts["chosen"], counts["rejected"], counts["tie"]]
        assert sum(row["votes"]) == 3
        assert row["votes"][0] >= row["votes"][1]


@pytest.mark.parametrize("annotator", [0, 1, 2])
def test_annotators_err_as_often_as_they_should(splits, annotator):
    # far apart, the gold reward leaves no doubt, and every wrong vote is an error
    rows = [row for row in splits["train"] if abs(gold_difference(row)) > 1.2]
    wrong = ["rejected" if gold_difference(row) > 0 else "chosen" for row in rows]
    assert "tie" not in {row["annotator_votes"][annotator] for row in rows}
    errors = sum(row["annotator_votes"][annotator] == vote for row, vote in zip(rows, wrong, strict=True))
    near(errors / len(rows), (0.05, 0.2, 0.45)[annotator], len(rows))


def test_ties_are_between_near_equals(splits):
    close = [row for row in splits["train"] if abs(gold_difference(row)) < 0.1]
    near(sum(row["votes"][2] for row in close) / (3 * len(close)), 0.5, 3 * len(close))
    assert all(row["votes"][2] == 0 for row in splits["train"] if abs(gold_difference(row)) >= 0.1)


def test_even_votes_are_turned_at_random(splits):
    even = [row for row in splits["train"] if row["votes"][0] == row["votes"][1] and gold_difference(row) != 0]
    near(sum(gold_difference(row) > 0 for row in even) / len(even), 0.5, len(even))


def test_the_careful_annotator_is_mostly_right(splits):
    rows = [row for row in splits["train"] if row["annotator_votes"][0] != "tie" and gold_difference(row) != 0]
    right = sum((row["annotator_votes"][0] == "chosen") == (gold_difference(row) > 0) for row in rows)
    assert right / len(rows) > 0.8


@pytest.mark.parametrize(("delta", "error_rate"), [(0.3, 0.05), (-0.7, 0.2), (0.0, 0.45)])
def test_vote_prob_is_bradley_terry_with_errors(delta, error_rate):
    # a vote is turned round with probability ε, so its log-odds shrink: E[±1] = (1 − 2ε)·tanh(Δ/2τ)
    mean = 2 * annotate.vote_prob(delta, error_rate) - 1
    assert mean == pytest.approx((1 - 2 * error_rate) * math.tanh(delta / (2 * 0.2)))


def test_the_seed_decides_and_the_bytes_follow(tmp_path):
    pairs = [Pair("The movie", f" was {word}.", " was boring.") for word in ("good", "superb", "fine", "dull", "bad")]

    def written(seed: int, name: str) -> bytes:
        rng = random.Random(seed)
        annotate.write_preferences([annotate.judge(pair, rng) for pair in 10 * pairs], tmp_path / name)
        return (tmp_path / name).read_bytes()

    assert written(1, "a.jsonl.gz") == written(1, "b.jsonl.gz")
    assert written(1, "a.jsonl.gz") != written(2, "b.jsonl.gz")
    first = json.loads(gzip.decompress(written(1, "a.jsonl.gz")).splitlines()[0])
    assert {first["chosen"], first["rejected"]} == {" was good.", " was boring."}


@pytest.mark.slow
def test_pairs_are_drawn_from_the_bundled_model():
    splits = annotate.make_preferences({"train": 2, "test": 1}, seed=3)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 64, "test": 32}
    assert splits == annotate.make_preferences({"train": 2, "test": 1}, seed=3)
    texts = {row[side] for rows in splits.values() for row in rows for side in ("chosen", "rejected")}
    assert sum(text.endswith(".") for text in texts) > 0.9 * len(texts)


def test_unknown_split():
    with pytest.raises(ValueError, match="`split` must be 'train' or 'test', got 'dev'"):
        toy.preferences("dev")
