"""What is said of a training that Ctrl-C or a full disk ended."""

import errno
from types import SimpleNamespace

import pytest

from rlhf_bayes.commands.flags.stopped import DiskFullError, command, is_full_disk, told_what_is_kept
from rlhf_bayes.commands.wrong_input import in_a_line
from rlhf_bayes.trainers.faults.whole_checkpoints import seal


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/rlhf-bayes", "ppo", "--words", "a b", "--overwrite_output_dir"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    args = SimpleNamespace(output_dir=str(tmp_path), save_steps=500)
    return SimpleNamespace(args=args, state=SimpleNamespace(global_step=7))


def saved(folder, step):
    (folder / f"checkpoint-{step}").mkdir()
    seal(folder / f"checkpoint-{step}")


def test_ctrl_c_names_the_checkpoint_and_the_command(trainer, tmp_path):
    saved(tmp_path, 5)
    with pytest.raises(KeyboardInterrupt) as found, told_what_is_kept(trainer):
        raise KeyboardInterrupt
    assert found.value.__notes__ == [
        f"Kept: {tmp_path / 'checkpoint-5'}, of 7 steps done. Go on from it: "
        "rlhf-bayes ppo --words 'a b' --resume_from_checkpoint auto"
    ]


def test_where_nothing_is_kept_it_says_so(trainer):
    with pytest.raises(KeyboardInterrupt) as found, told_what_is_kept(trainer):
        raise KeyboardInterrupt
    (said,) = found.value.__notes__
    assert said.startswith("No checkpoint is kept: 7 steps were done, and one is saved every 500 (`--save_steps`).")
    assert said.endswith("Start again: rlhf-bayes ppo --words 'a b'")


def test_after_the_training_the_model_is_kept(trainer, tmp_path):
    with pytest.raises(KeyboardInterrupt) as found, told_what_is_kept(trainer, trained=True):
        raise KeyboardInterrupt
    assert found.value.__notes__ == [f"The trained model is kept in {tmp_path}; only the report is not finished."]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(trainer, tmp_path, error):
    saved(tmp_path, 5)
    said = r"^The disk is full. Make room. Kept: .*checkpoint-5"
    with pytest.raises(DiskFullError, match=said) as found, told_what_is_kept(trainer):
        raise error
    found.value.__traceback__ = found.value.__traceback__.tb_next
    error.__traceback__ = None  # both without the frame of this test, which is code of a user
    assert in_a_line(found.value) == str(found.value)


def test_other_errors_pass(trainer):
    with pytest.raises(RuntimeError, match=r"^mine$"), told_what_is_kept(trainer):
        raise RuntimeError("mine")
    assert not is_full_disk(OSError(errno.EACCES, "no"))


@pytest.mark.parametrize(
    ("arguments", "launched", "expected"),
    [
        (["recipes/ppo_klrl.py", "--beta", "1"], False, "python recipes/ppo_klrl.py --beta 1"),
        (["recipes/ppo_klrl.py", "--beta", "1"], True, "accelerate launch recipes/ppo_klrl.py --beta 1"),
        (["/x/rlhf_bayes/__main__.py", "gdc"], True, "accelerate launch -m rlhf_bayes gdc"),
        (["rlhf-bayes", "ppo", "--resume-from-checkpoint", "x", "--seed", "1"], False, "rlhf-bayes ppo --seed 1"),
        (["rlhf-bayes", "ppo", "--resume_from_checkpoint=x"], False, "rlhf-bayes ppo"),
    ],
)
def test_the_command_is_that_which_was_given(arguments, launched, expected, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    assert command(arguments, resume=False) == expected
    assert command(arguments, resume=True) == f"{expected} --resume_from_checkpoint auto"
