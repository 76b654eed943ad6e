"""Prompts, preferences and rewards by name."""

import gzip
import json
import sys

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_bayes import LanguageModel, toy
from rlhf_bayes.cli import hold_out, load_pooled_reward, load_preferences, load_prompts, load_reward_func
from rlhf_bayes.rewards import RewardEnsemble, RewardModel
from rlhf_bayes.toy.rewards import sentiment_reward

ROWS = [{"text": f"opening {number}", "prompt": "not this", "label": number} for number in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=["jsonl", "json.gz", "csv", "parquet", "saved", "splits"])
def source(request, tmp_path):
    path, dataset = tmp_path / f"rows.{request.param}", Dataset.from_list(ROWS)
    match request.param:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case "json.gz":
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
        case "csv":
            dataset.to_csv(path)
        case "parquet":
            dataset.to_parquet(path)
        case "saved":
            dataset.save_to_disk(path)
        case "splits":
            DatasetDict(train=dataset, other=dataset.select([0])).save_to_disk(path)
    return str(path)


def test_prompts_of_every_format(source):
    dataset = load_prompts(source, prompt_column="text")
    assert set(dataset.column_names) == {"prompt", "label"}
    assert dataset["prompt"][:] == [row["text"] for row in ROWS]
    assert dataset["label"][:] == [0, 1, 2, 3, 4]


def test_text_file(tmp_path):
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    assert load_prompts(str(tmp_path / "rows.txt"), prompt_column="text")["prompt"][:] == ["one", "two"]


def test_a_random_choice_of_prompts(tmp_path):
    Dataset.from_list(ROWS * 20).save_to_disk(tmp_path / "rows")
    chosen = [
        load_prompts(str(tmp_path / "rows"), "text", max_prompts=30, seed=seed)["label"][:] for seed in (1, 1, 2)
    ]
    assert len(chosen[0]) == 30
    assert chosen[0] == chosen[1] != chosen[2]


def test_splits(tmp_path):
    dataset = Dataset.from_list(ROWS)
    DatasetDict(train=dataset, other=dataset.select([3])).save_to_disk(tmp_path / "rows")
    assert load_prompts(str(tmp_path / "rows"), "text", split="other")["label"][:] == [3]
    with pytest.raises(ValueError, match=r"must be one of \['other', 'train'\].* got 'test'"):
        load_prompts(str(tmp_path / "rows"), "text", split="test")


def test_reward_functions(tmp_path, monkeypatch):
    assert load_reward_func("rlhf_bayes.toy.rewards:sentiment_reward") is sentiment_reward
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_of_test_cli.py").write_text(
        "def one(completions, **columns):\n    return [1.0]\nnumber = 3\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_reward_func("rewards_of_test_cli:one")([]) == [1.0]
    with pytest.raises(ValueError, match=r"got 'number'. It has \['one'\]"):
        load_reward_func("rewards_of_test_cli:number")


PAIRS = [
    {"better": f"kind {row}", "worse": f"rude {row}", "chosen": "not this", "topic": row % 3, "counts": [2, 1, 0]}
    for row in range(12)
]


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return str(path)


def test_preferences_under_the_names_of_the_trainer(pairs_file):
    columns = ["chosen=better", "rejected=worse", "votes=counts"]
    dataset = load_preferences(pairs_file, columns=columns, drop_columns=["topic"])
    assert set(dataset.column_names) == {"chosen", "rejected", "votes"}
    assert dataset[3] == {"chosen": "kind 3", "rejected": "rude 3", "votes": [2, 1, 0]}
    chosen = [load_preferences(pairs_file, columns=columns, max_pairs=5, seed=seed)["chosen"][:] for seed in (1, 1, 2)]
    assert len(chosen[0]) == 5
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"must have the columns `chosen` and `rejected`.*--columns rejected=<column>"),
        ({"columns": ["rejected=wrose"]}, "`columns` must name columns of `dataset_name`.* got 'wrose'"),
        ({"columns": ["rejected"]}, "entries of the form `name=column`, got 'rejected'"),
        ({"drop_columns": ["vote"]}, "`drop_columns` must name columns of `dataset_name`.* got 'vote'"),
        ({"max_pairs": 0}, "`max_pairs` must be at least 1, got 0"),
    ],
)
def test_preferences_that_are_refused(pairs_file, options, message):
    with pytest.raises(ValueError, match=message):
        load_preferences(pairs_file, **options)


def test_hold_out():
    dataset = Dataset.from_list(PAIRS)
    train, test = hold_out(dataset, 0.25, seed=1)
    assert (len(train), len(test)) == (9, 3)
    assert sorted([*train["better"], *test["better"]]) == sorted(dataset["better"])
    assert hold_out(dataset, 0.25, seed=1)[1]["better"][:] == test["better"][:]
    assert len(hold_out(dataset, 0.001)[1]) == 1
    train, test = hold_out(dataset, 0.34, by="topic")
    assert len(set(test["topic"])) == 1
    assert len(test) == 4
    assert not set(train["topic"]) & set(test["topic"])


@pytest.mark.parametrize(
    ("share", "by", "message"),
    [
        (1.0, None, "`held_out` must be between 0 and 1, got 1.0"),
        (0.1, "subject", "`held_out_by` must be one of the columns, .* got 'subject'"),
        (0.1, "counts", r"at least 2 groups in 'counts' to hold some out, got 1"),
    ],
)
def test_hold_out_refuses(share, by, message):
    with pytest.raises(ValueError, match=message):
        hold_out(Dataset.from_list(PAIRS), share, by)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """An ensemble of three random heads, on disk."""
    folder = tmp_path_factory.mktemp("rewards") / "heads"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(toy.model_path(), num_labels=3)
    RewardEnsemble(model, AutoTokenizer.from_pretrained(toy.model_path())).save_pretrained(folder)
    return str(folder)


def test_pooled_reward_is_centered_on_the_prior(heads):
    prior = LanguageModel(toy.model_path(), max_completion_length=6)
    texts = [" was good.", " was bad."]
    pooled = load_pooled_reward(heads, "min", prior, ["The movie"], beta=0.1, num_samples=8, seed=3)
    drawn = prior.sample(["The movie"], n=8, generator=torch.Generator().manual_seed(3))
    ensemble = RewardEnsemble.from_pretrained(heads)
    members = ensemble.member_rewards(["The movie"] * 2, texts)  # (K, 2)
    means = ensemble.member_rewards(drawn.prompts, drawn.texts).mean(1, keepdim=True)  # (K, 1)
    expected = (members - means).amin(0) + means.mean()
    torch.testing.assert_close(torch.tensor(pooled(["The movie"] * 2, texts)), expected)


def test_pooled_reward_of_the_mean_needs_no_draws(heads):
    prior = LanguageModel(toy.model_path())
    reward = load_pooled_reward(heads, "mean", prior, [], beta=0.1)
    assert isinstance(reward, RewardEnsemble)
    with pytest.raises(ValueError, match="`penalty` must be left out with the rule 'mean'"):
        load_pooled_reward(heads, "mean", prior, [], penalty=1.0)


def test_a_single_model_has_nothing_to_pool(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(toy.model_path(), num_labels=1)
    RewardModel(model, AutoTokenizer.from_pretrained(toy.model_path())).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`reward_rule` must be 'mean' for a single reward model"):
        load_pooled_reward(str(tmp_path), "pessimistic", LanguageModel(toy.model_path()), ["I"], beta=0.1)


def test_preferences_may_swap_columns(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": "a", "rejected": "b", "other": "c"}) + "\n")
    swapped = load_preferences(str(path), columns=["chosen=rejected", "rejected=chosen"])
    assert swapped[0] == {"chosen": "b", "rejected": "a", "other": "c"}
    moved = load_preferences(str(path), columns=["chosen=other", "rejected=chosen"])
    assert moved[0] == {"chosen": "c", "rejected": "a"}
    with pytest.raises(ValueError, match="`columns` must name each column once"):
        load_preferences(str(path), columns=["prompt=other", "chosen=other"])
