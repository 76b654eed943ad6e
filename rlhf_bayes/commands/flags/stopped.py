"""What a training that was stopped leaves: a sentence that says what is kept, and the command to go on."""

import errno
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer

from rlhf_bayes.trainers.faults.whole_checkpoints import whole_checkpoints

_FULL = "No space left on device"
# what torch says where the disk is full: its zip writer does not pass the system's reason on
_TORCH_WRITE = ("PytorchStreamWriter failed writing", "unexpected pos", "file write failed")


class DiskFullError(OSError):
    """The disk is full; the message says what is kept, and how to go on."""


@contextmanager
def told_what_is_kept(trainer: Trainer, trained: bool = False) -> Iterator[None]:
    """
    A context in which Ctrl-C and a full disk are told with what is kept, and with the command to go on.

    Args:
        trainer (`Trainer`):
            The trainer.
        trained (`bool`):
            Whether the trained model has been saved, so that only what follows is lost.

    Raises:
        KeyboardInterrupt: with a note that says so.
        DiskFullError: in place of the error of the file that could not be written.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)  # the line of the progress bar ends here
        stop.add_note(what_is_kept(trainer, trained))
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        print(file=sys.stderr)
        raise DiskFullError(f"The disk is full. Make room. {what_is_kept(trainer, trained)}") from error


def what_is_kept(trainer: Trainer, trained: bool) -> str:
    """A sentence on what is on the disk, and the command to go on from it."""
    folder, step = trainer.args.output_dir, trainer.state.global_step
    if trained:
        return f"The trained model is kept in {folder}; only the report is not finished."
    whole = whole_checkpoints(Path(folder))
    if not whole:
        return (
            f"No checkpoint is kept: {step} steps were done, and one is saved every {trainer.args.save_steps:g} "
            f"(`--save_steps`). Start again: {command(sys.argv, resume=False)}"
        )
    newest = max(whole)
    return f"Kept: {whole[newest]}, of {step} steps done. Go on from it: {command(sys.argv, resume=True)}"


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there is no room on the disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(error) for text in (_FULL, *_TORCH_WRITE)):
            return True
        error = error.__cause__ or error.__context__
    return False


def command(arguments: Sequence[str], resume: bool) -> str:
    """
    The command that was given, for a shell, to be given again.

    Args:
        arguments (`Sequence[str]`):
            `sys.argv`.
        resume (`bool`):
            Whether it goes on from a checkpoint.
    """
    script, *words = arguments
    kept: list[str] = []
    while words:
        word = words.pop(0)
        flag = word.partition("=")[0].lstrip("-").replace("-", "_")
        if flag not in ("resume_from_checkpoint", "overwrite_output_dir"):
            kept.append(word)
        elif "=" not in word and words and not words[0].startswith("--"):
            words.pop(0)
    if resume:
        kept += ["--resume_from_checkpoint", "auto"]
    launched = "LOCAL_RANK" in os.environ
    if Path(script).name in ("rlhf-bayes", "__main__.py"):
        start = ["accelerate", "launch", "-m", "rlhf_bayes"] if launched else ["rlhf-bayes"]
    else:
        start = ["accelerate", "launch", script] if launched else ["python", script]
    return shlex.join([*start, *kept])
