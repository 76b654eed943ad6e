"""A checkpoint says whether it is whole, whatever was lost of it."""

import json
import os

import pytest

from rlhf_bayes.trainers.faults.whole_checkpoints import (
    MANIFEST,
    checkpoints,
    defect,
    remove,
    rotate,
    seal,
    whole_checkpoints,
)

FILES = ("model.safetensors", "critic/config.json", "rng_state_0.pth")


def written(folder, step, sealed=True, saved_at=None):
    checkpoint = folder / f"checkpoint-{step}"
    for name in FILES:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"x" * (10 + step))
    if sealed:
        seal(checkpoint)
    if saved_at is not None:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"saved_at": saved_at}))
    return checkpoint


def test_what_was_sealed_is_whole(tmp_path):
    checkpoint = written(tmp_path, 5)
    assert defect(checkpoint) is None
    assert set(json.loads((checkpoint / MANIFEST).read_text())["files"]) == set(FILES)
    (checkpoint / "notes.txt").write_text("a user's")  # more than was written is no harm
    assert defect(checkpoint) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("loss", ["cut short", "empty", "gone"])
def test_any_file_that_lost_something_is_named(tmp_path, name, loss):
    checkpoint = written(tmp_path, 5)
    if loss == "gone":
        (checkpoint / name).unlink()
        expected = f"`{name}` is missing"
    else:
        size = 14 if loss == "cut short" else 0
        os.truncate(checkpoint / name, size)
        expected = f"`{name}` has {size} bytes of 15"
    assert defect(checkpoint) == expected


def test_without_its_list_or_with_half_of_it_nothing_is_whole(tmp_path):
    assert "is missing" in defect(written(tmp_path, 5, sealed=False))
    checkpoint = written(tmp_path, 6)
    os.truncate(checkpoint / MANIFEST, 20)
    assert "cannot be read" in defect(checkpoint)
    (checkpoint / MANIFEST).write_text("[]")
    assert "cannot be read" in defect(checkpoint)


def test_whole_ones_are_found_by_step_and_the_others_named(tmp_path, caplog):
    for step in (10, 9, 100, 11):
        written(tmp_path, step, sealed=step != 100)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert list(checkpoints(tmp_path)) == [9, 10, 11, 100]
    assert list(whole_checkpoints(tmp_path)) == [9, 10, 11]
    assert "checkpoint-100` is skipped" in caplog.text
    assert checkpoints(tmp_path / "nowhere") == {}


def test_older_ones_go_first_after_those_that_are_not_whole(tmp_path):
    # 40 is of an earlier run that went further; 15 was cut short
    for step, saved_at in ((10, 3.0), (20, 4.0), (40, 1.0)):
        written(tmp_path, step, saved_at=saved_at)
    written(tmp_path, 15, sealed=False)
    newest = written(tmp_path, 30, saved_at=5.0)
    left = [[10, 20, 30, 40], [10, 20, 30], [20, 30], [30], [30]]
    for limit, steps in zip((4, 3, 2, 1, None), left, strict=True):
        rotate(tmp_path, limit, [newest])
        assert list(checkpoints(tmp_path)) == steps


def test_the_newest_and_the_best_stay(tmp_path):
    best, _, newest = (written(tmp_path, step, saved_at=float(step)) for step in (1, 2, 3))
    rotate(tmp_path, 1, [newest, best])
    assert list(checkpoints(tmp_path)) == [1, 3]


def test_what_is_half_removed_is_not_whole(tmp_path, monkeypatch):
    checkpoint = written(tmp_path, 5)
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # killed before the first file went
    remove(checkpoint)
    assert "is missing" in defect(checkpoint)
