"""A store keeps what was drawn as it was, refuses what does not belong together, and survives cuts."""

import dataclasses
import errno
import json
import logging
import math
import multiprocessing
import os
import signal
import time

import datasets
import pyarrow.parquet as pq
import pytest

from rlhf_bayes.store import CompletionStore

from .stored import all_once, completion, provenance


def test_what_is_read_is_what_was_written(toy, tmp_path):
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "é"}]
    changes = {"prompt": chat, "step": 3, "columns": {"topic": ["x", 1]}, "log_densities": {"b": -3.0}}
    whole = completion(toy, 1, 7, -2.5, "policy at step 3", **changes)
    other = completion(toy, 0, 2, -1.0, "prior", rewards={"toy_reward": -math.inf}, features={"length": None})
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    store.append([whole])
    store.append([other])
    rows = CompletionStore(tmp_path / "store").read().to_list()
    assert json.loads(rows[0]["prompt"]) == chat
    assert rows[0]["is_chat"]
    assert json.loads(rows[0]["columns"]) == {"topic": ["x", 1]}
    assert rows[0]["completion_ids"] == list(whole.completion_ids)
    assert rows[0]["log_density/b"] == -3.0
    assert rows[0]["step"] == 3
    assert rows[1]["prompt"] == toy.prompts[0]
    assert not rows[1]["is_chat"]
    assert rows[1]["reward/toy_reward"] == -math.inf
    assert rows[1]["feature/starts_with_a"] is None  # the file of this row has another feature
    assert [row["log_prior"] for row in rows] == [whole.log_prior, other.log_prior]


def test_other_programs_read_it(toy, tmp_path):
    all_once(toy, tmp_path / "store")
    files = str(tmp_path / "store" / "*.parquet")
    read = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(read) == len(toy.prompts) * len(toy.completion_ids)
    assert set(read["prompt"]) == set(toy.prompts)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("prior", "float32-0123456789abcdef"),
        ("tokenizer", "0123"),
        ("chat_template", "0123"),
        ("temperature", 0.7),
        ("max_completion_length", 5),
        ("eos_token_ids", [1, 2]),
        ("rewards", {"toy_reward": "another.toy_reward 0123"}),
        ("features", {"polite": "0123"}),
    ],
)
def test_what_another_made_is_refused_by_name_with_both_values(toy, tmp_path, entry, value):
    made = provenance(toy)
    CompletionStore.create(tmp_path / "store", made)
    CompletionStore.create(tmp_path / "store", dataclasses.replace(made, name="elsewhere"))
    with pytest.raises(ValueError, match=f"`{entry}`") as refused:
        CompletionStore.create(tmp_path / "store", dataclasses.replace(made, **{entry: value}))
    first = value if not isinstance(value, dict) else next(iter(value.values()))
    assert str(first) in str(refused.value)
    own = getattr(made, entry)
    assert str(own if not isinstance(own, dict) else next(iter(own.values()), "none")) in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [{"log_prior": math.nan}, {"log_proposal": -math.inf}, {"rewards": {"toy_reward": math.nan}}, {"rewards": {}},
     {"columns": {"image": object()}}],
)  # fmt: skip
def test_what_cannot_be_true_is_refused_and_nothing_is_written(toy, tmp_path, changes):
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    rows = [completion(toy, 0, 0, -1.0, "prior"), dataclasses.replace(completion(toy, 0, 1, -1.0, "prior"), **changes)]
    with pytest.raises(ValueError, match=next(iter(changes)).rstrip("s")):
        store.append(rows)
    assert len(store) == 0
    assert [path.name for path in store.path.iterdir()] == ["store.json"]


def test_a_folder_with_other_things_is_refused(tmp_path, toy):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        CompletionStore.create(tmp_path, provenance(toy))
    with pytest.raises(ValueError, match="must be a store"):
        CompletionStore(tmp_path)


def test_a_later_version_is_refused(toy, tmp_path):
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    manifest = store.path / "store.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 9}))
    with pytest.raises(ValueError, match=r"version 1, got .* of version 9"):
        CompletionStore(store.path)


def test_a_file_that_was_cut_is_left_out_and_named(toy, tmp_path, caplog):
    store = all_once(toy, tmp_path / "store")
    last = sorted(store.path.glob("*.parquet"))[-1]
    last.write_bytes(last.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        rows = CompletionStore(store.path).read()
    assert set(rows["prompt"]) == set(toy.prompts[:2])
    assert last.name in caplog.text


def test_a_full_disk_loses_nothing_that_was_there(toy, tmp_path, monkeypatch):
    store = all_once(toy, tmp_path / "store")
    before = len(store)

    def full(table, file):
        file.write(b"PAR1 half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left") as failed:
        store.append([completion(toy, 0, 0, -1.0, "prior")])
    assert "1 completions could not be added" in failed.value.__notes__[0]
    assert "What it held before is whole" in failed.value.__notes__[0]
    again = CompletionStore(store.path)
    assert len(again) == before
    assert again.incomplete == []


def test_a_file_of_the_same_name_is_replaced(toy, tmp_path):
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    for _ in range(2):
        store.append([completion(toy, 0, 0, -1.0, "prior")], name="run-0")
        assert len(store) == 1


def _write(folder, made, rows, times):
    for _ in range(times):
        CompletionStore.create(folder, made).append(rows)


@pytest.mark.processes
def test_writers_at_once_and_one_that_is_killed(toy, tmp_path):
    """Two processes make the store together; one is killed while it writes. Each file is whole or not there."""
    made, folder = provenance(toy), tmp_path / "store"
    rows = [completion(toy, 0, index, -1.0, "prior") for index in range(len(toy.completion_ids))] * 20
    context = multiprocessing.get_context("fork")
    killed = context.Process(target=_write, args=(folder, made, rows, 10_000))
    other = context.Process(target=_write, args=(folder, made, rows, 10))
    killed.start()
    other.start()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.parquet"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    other.join()
    killed.join()
    store = CompletionStore(folder)
    assert len(store) == len(rows) * len(list(folder.glob("*.parquet")))
    assert len(store) >= 10 * len(rows)
    store.append(rows)
    assert len(store) % len(rows) == 0
