"""A reader takes each file of a growing store once, and another that goes on from its position takes the same."""

import logging

import pytest

from rlhf_bayes.store import CompletionStore
from rlhf_bayes.store.store_reader import StoreReader

from .stored import completion, provenance


@pytest.fixture
def store(toy, tmp_path):
    return CompletionStore.create(tmp_path / "store", provenance(toy))


def add(toy, store, name, index=0):
    store.append([completion(toy, 0, index, -1.0, "prior")], name)


def all_names(reader):
    while reader.next() is not None:
        pass
    return [name.removesuffix(".parquet") for name in reader.taken]


def test_files_of_several_writers_are_read_once_in_a_kept_order(toy, store, tmp_path):
    reader = StoreReader(store, tmp_path / "read.txt")
    assert reader.next() is None
    add(toy, store, "5-of-one", index=3)
    add(toy, store, "6-of-one")
    (row,) = reader.next()
    assert row["completion_ids"] == toy.completion_ids[3]
    position = list(reader.taken)
    reader.next()
    add(toy, store, "5-of-another")  # a name before those that were read
    assert all_names(reader) == ["5-of-one", "6-of-one", "5-of-another"]
    # by name alone, a second reader would take 5-of-another first
    again = StoreReader(store, tmp_path / "read.txt")
    again.go_on_after(position)
    assert again.num_ahead == 2
    add(toy, store, "4-of-a-third")
    assert all_names(again) == ["5-of-one", "6-of-one", "5-of-another", "4-of-a-third"]
    assert (tmp_path / "read.txt").read_text().splitlines() == again.taken


def test_a_position_holds_without_its_journal(toy, store, tmp_path):
    for name in "abc":
        add(toy, store, name)
    reader = StoreReader(store, tmp_path / "new.txt")
    reader.go_on_after(["c.parquet"])
    assert all_names(reader) == ["c", "a", "b"]
    assert all_names(StoreReader(store, tmp_path / "new.txt")) == ["c", "a", "b"]


def test_a_journal_that_was_cut_in_the_middle_of_a_name(toy, store, tmp_path):
    for name in "abc":
        add(toy, store, name)
    (tmp_path / "read.txt").write_text("b.parquet\nc.par")
    assert all_names(StoreReader(store, tmp_path / "read.txt")) == ["b", "a", "c"]
    assert (tmp_path / "read.txt").read_text() == "b.parquet\na.parquet\nc.parquet\n"


def test_a_file_that_was_cut_is_left_out_and_named_once(toy, store, tmp_path, caplog):
    add(toy, store, "a")
    add(toy, store, "b")
    cut = store.path / "a.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    reader = StoreReader(store, tmp_path / "read.txt")
    with caplog.at_level(logging.WARNING):
        assert all_names(reader) == ["b"]
        assert reader.next() is None
    assert caplog.text.count("a.parquet") == 1


def test_a_file_that_was_read_before_and_is_gone_is_named(toy, store, tmp_path):
    add(toy, store, "a")
    (tmp_path / "read.txt").write_text("b.parquet\n")
    with pytest.raises(ValueError, match=r"must hold the file 'b\.parquet', which was read before"):
        StoreReader(store, tmp_path / "read.txt").next()
