"""Prompts and preferences by name."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from rlhf_bayes import toy
from rlhf_bayes.commands.flags import hold_out, load_preferences, load_prompts, prompts_of_pairs

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


def test_prompts_that_are_none_are_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": null}\n')
    with pytest.raises(TypeError, match=r"must hold texts or chats, got None in row 1 of 'prompt'"):
        load_prompts(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match=r"must hold at least one row, got the empty file"):
        load_prompts(str(path))


USER = {"role": "user", "content": "Was it good?"}
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


def test_preferences_may_swap_columns(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": "a", "rejected": "b", "other": "c"}) + "\n")
    swapped = load_preferences(str(path), columns=["chosen=rejected", "rejected=chosen"])
    assert swapped[0] == {"chosen": "b", "rejected": "a", "other": "c"}
    moved = load_preferences(str(path), columns=["chosen=other", "rejected=chosen"])
    assert moved[0] == {"chosen": "c", "rejected": "a"}
    with pytest.raises(ValueError, match="`columns` must name each column once"):
        load_preferences(str(path), columns=["prompt=other", "chosen=other"])


def test_columns_of_counts_become_votes(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"a": "one", "b": "two", "likes_a": 3, "likes_b": 1},
        {"a": "one", "b": "three", "likes_a": 0, "likes_b": 2},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_preferences(str(path), columns=["chosen=a", "rejected=b", "votes=likes_a,likes_b"])
    assert set(dataset.column_names) == {"chosen", "rejected", "votes"}
    assert dataset["votes"][:] == [[3, 1], [0, 2]]
    with pytest.raises(ValueError, match=r"`columns` must name columns of `dataset_name`.* got 'likes_c'"):
        load_preferences(str(path), columns=["chosen=a", "rejected=b", "votes=likes_a,likes_c"])


def test_prompts_are_those_that_a_language_model_can_complete(tmp_path, caplog):
    pairs = Dataset.from_list(
        [
            {"chosen": "The soup was warm.", "rejected": "The soup was cold."},
            {"chosen": "The soup was dull.", "rejected": "The soup was good."},
            {"chosen": "Cats sleep ", "rejected": "Dogs bark"},
            {"chosen": "It was very" * 60 + " good", "rejected": "It was very" * 60 + " bad"},
        ]
    )
    assert prompts_of_pairs(pairs, 9, toy.model_path(), 16) == ["The soup was"]
    assert "1 of 2 prompts and a completion of 16 tokens have more tokens than" in caplog.text
    with pytest.raises(ValueError, match=r"2 of 2 prompts .* None is left to draw completions for"):
        prompts_of_pairs(pairs, 9, toy.model_path(), 127)
    chats = [{"chosen": [USER, {"role": "assistant", "content": text}]} for text in ("Yes", "No")]
    chats = Dataset.from_list([{"chosen": chats[0]["chosen"], "rejected": chats[1]["chosen"]}])
    with pytest.raises(ValueError, match=r"must have a `chat_template` .* Set `--chat_template_path`"):
        prompts_of_pairs(chats, 9, toy.model_path(), 16)
