"""Folders that hold another run."""

import pytest

from rlhf_bayes.commands.flags.output_folder import check_output_dir, clear_output_dir
from rlhf_bayes.trainers.faults.whole_checkpoints import seal


@pytest.fixture
def used(tmp_path):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("1")
        seal(folder)
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


def test_a_new_folder_and_one_without_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    check_output_dir(tmp_path, False, None)
    check_output_dir(tmp_path / "new", False, None)


def test_another_run_is_refused_with_both_ways_out(used):
    with pytest.raises(ValueError, match=r"checkpoints up to step 10.*--resume_from_checkpoint auto.*--overwrite_out"):
        check_output_dir(used, False, None)
    for resume in ("auto", True, str(used / "checkpoint-5")):
        check_output_dir(used, False, resume)
    check_output_dir(used, True, None)
    with pytest.raises(ValueError, match="must be left out with `--resume_from_checkpoint`, got 'auto'"):
        check_output_dir(used, True, "auto")


def test_a_finished_run_without_checkpoints_is_one(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a finished one, trainer_state\.json"):
        check_output_dir(tmp_path, False, "false")


def test_what_is_deleted_is_of_the_run(used):
    clear_output_dir(used)
    assert [path.name for path in used.iterdir()] == ["notes.txt"]
    check_output_dir(used, False, None)
