import json
import math
import statistics

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_bayes import toy

from .scripts import load

pytestmark = pytest.mark.slow

files = load("preference_files")
methods = load("reward_methods")


def test_votes_follow_the_texts_when_a_pair_is_turned():
    pair = {
        "title": "Tea",
        "votes": [[1, "a2", 0.1], [2, "a2", 0.2], [3, "equal", 0.3], [4, "a1", 0.4], [5, "a2", 0.5]],
    }
    row = files.ukp_row(pair, {"text": "worse", "stance": "No"}, {"text": "better", "stance": "No"})
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Tea No\n", "better", "worse")
    assert row["votes"] == [3, 1, 1]
    assert row["chosen_prob"] == pytest.approx(0.7)
    assert dict(zip(row["annotators"], row["annotator_votes"], strict=True)) == {
        "1": "chosen",
        "2": "chosen",
        "3": "tie",
        "4": "rejected",
        "5": "chosen",
    }


def test_no_group_is_on_both_sides_of_a_split(preferences):
    rows = files.load_ukp(preferences)
    pairs = files.split(rows, seed=3, share=0.25)
    train, test = pairs.train, pairs.test
    assert not {row["group"] for row in train} & {row["group"] for row in test}
    assert len(train) + len(test) == len(rows) == 36
    assert len(test) == 12  # a quarter is 9 rows, and a topic has 6
    assert files.split(rows, seed=3, share=0.25, train_pairs=5, test_pairs=4) == files.Pairs(train[:5], test[:4])
    held_out = {tuple(sorted({row["group"] for row in files.split(rows, seed, 0.25).test})) for seed in range(5)}
    assert len(held_out) > 1


def test_a_long_prompt_loses_its_beginning():
    tokenizer = AutoTokenizer.from_pretrained(toy.model_path())
    opening, ending = "the film was very good . " * 20, "the plot is bad"
    rows = [{"prompt": opening + ending, "chosen": " and long", "rejected": " and bad"}]
    (row,) = files.fitted(rows, tokenizer, max_length=24)
    assert row["prompt"].endswith(ending)
    assert len(row["prompt"]) < len(opening)
    assert len(tokenizer(row["prompt"] + row["chosen"] + tokenizer.eos_token)["input_ids"]) <= 24
    assert files.fitted(rows, tokenizer, max_length=1000) == rows
    # answers that leave no room for a prompt
    assert files.fitted([{**rows[0], "chosen": opening}], tokenizer, max_length=24) == []


def test_batches_hold_rows_of_like_length():
    rows = [{"prompt": "", "chosen": "x" * length, "rejected": "y"} for length in range(1, 104)]
    ordered = files.in_batches_of_like_length(rows, batch=10, seed=1)
    lengths = [len(row["chosen"]) for row in ordered]
    assert sorted(lengths) == list(range(1, 104))
    batches = [lengths[start : start + 10] for start in range(0, 103, 10)]
    assert all(max(batch) - min(batch) < 10 for batch in batches)
    assert batches[:-1] != sorted(batches[:-1])


def test_a_vote_that_may_err_is_less_sure_than_the_preference():
    judged = methods.Judged(torch.tensor([[2.0, -1.0], [1.0, 0.5]]), torch.zeros(2, 2))
    prob = [statistics.mean(1 / (1 + math.exp(-r)) for r in rewards) for rewards in ((2.0, 1.0), (-1.0, 0.5))]
    assert judged.prob.tolist() == pytest.approx(prob)
    expected = [0.8 * p + 0.2 * (1 - p) for p in prob]
    assert methods.of_a_vote(judged, 0.2).prob.tolist() == pytest.approx(expected)
    assert methods.mean_error_rate({"a": 0.1, "b": 0.4}, [{"annotators": ["a", "b"]}, {"annotators": ["a"]}]) == (
        pytest.approx(0.2)
    )


def test_errors_are_those_of_the_mean_over_seeds():
    assert methods.mean_and_error([1.0, 2.0, 4.0]) == "2.3333 ± 0.8819"  # standard deviation 1.5275, over √3
    assert methods.mean_and_error([0.5]) == "0.5000"


def test_differences_are_taken_within_a_seed():
    def figures(*values):
        return [{"log_loss": value, "brier": value, "accuracy": value} for value in values]

    results = {methods.NOTHING: figures(1, 1), methods.LABEL: figures(1.0, 2.0), methods.VOTES: figures(0.75, 1.5)}
    name, log_loss, *_ = (list(column.cells) for column in methods.differences_table(results).columns)
    assert (name, log_loss) == ([methods.VOTES], ["-0.3750 ± 0.1250"])


def test_words_find_that_longer_texts_win(preferences):
    pairs = files.split(files.load_ukp(preferences), seed=0, share=0.25)
    for max_words in (0, None):
        metrics = methods.metrics_of(methods.judge_words(pairs, seed=0, max_words=max_words), pairs)
        assert metrics["accuracy"] == 1
        assert metrics["log_loss"] < methods.metrics_of(methods.judge_nothing(pairs), pairs)["log_loss"]


@pytest.mark.parametrize("data", ["ukp", "hh"])
def test_every_method_is_judged_on_the_same_pairs(data, preferences, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "quiet", lambda **options: None)  # for the tests that come after in this process
    image, figures = tmp_path / "reliability.png", tmp_path / "figures.json"
    chosen = [part for name in methods.METHODS[data] for part in ("--method", name)]
    options = ["--seeds", "1", "--train-pairs", "12", "--test-pairs", "7", "--batch", "4", "--max-length", "64"]
    source = ["--data", data, "--folder", str(preferences), "--model", toy.model_path()]
    methods.main([*source, *options, *chosen, "--plot", str(image), "--json", str(figures)])
    output = capsys.readouterr().out
    assert "36 pairs. Left out: 0 with an empty text" in output
    assert ("vote accuracy" in output) == (data == "ukp")
    results = json.loads(figures.read_text())
    expected = {methods.NOTHING, methods.LENGTH, methods.WORDS, *methods.METHODS[data]}
    assert set(results) == expected | ({methods.OF_A_VOTE} if data == "ukp" else set())
    assert ["disagreement" in results[name][0] for name in (methods.LABEL, methods.HEADS, methods.LORA)] == [0, 1, 1]
    # of the same pairs: the ceiling of the votes does not depend on the method
    assert len({seed.get("vote_ceiling") for seeds in results.values() for seed in seeds}) == 1
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_label_is_always_trained_for_the_others_are_compared_with_it():
    source = ["--data", "ukp", "--folder", "f", "--model", "m"]
    assert methods.parse_args([*source, "--method", methods.HEADS]).methods == [methods.LABEL, methods.HEADS]


@pytest.mark.parametrize("arguments", [["--method", "share of votes"], ["--seeds", "0"]])
def test_bad_arguments_are_refused_before_any_run(arguments, capsys):
    with pytest.raises(SystemExit):
        methods.parse_args(["--data", "hh", "--folder", "f", "--model", "m", *arguments])
    assert arguments[0] in capsys.readouterr().err
