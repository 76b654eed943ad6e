"""Prompts and reward functions by name."""

import gzip
import json
import sys

import pytest
from datasets import Dataset, DatasetDict

from rlhf_bayes.cli import load_prompts, load_reward_func
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
