"""Refuses to mix a run with another one in the same folder, and clears the folder where that is asked for."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_bayes.trainers.faults.whole_checkpoints import checkpoints, remove

_STATE = "trainer_state.json"
# what the report reads of a run: of another run, it would be mixed with the new one
_OF_A_RUN = (_STATE, "evaluation.json", "sampling.json", "draws.jsonl", "prior.jsonl", "curves.png")


@dataclass
class OutputArguments:
    """A flag of all commands that train."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Start anew in a folder that holds another run. Its checkpoints and its report are deleted."
        },
    )


def check_output_dir(output_dir: str | Path, overwrite: bool, resume: Any) -> None:
    """
    Refuse a folder that holds another run, unless it is to be overwritten or resumed.

    Args:
        output_dir (`str` or `Path`):
            The folder.
        overwrite (`bool`):
            `--overwrite_output_dir`.
        resume (`str` or `bool`, *optional*):
            `--resume_from_checkpoint`.

    Raises:
        ValueError: if it holds one, or both flags are given.
    """
    folder = Path(output_dir)
    resumes = str(resume).lower() not in ("none", "false", "")
    if overwrite and resumes:
        raise ValueError(
            f"`--overwrite_output_dir` must be left out with `--resume_from_checkpoint`, got {resume!r}: the "
            "checkpoints would be deleted. Remove one of them."
        )
    if overwrite or resumes:
        return
    found = checkpoints(folder)
    if not found and not (folder / _STATE).is_file():
        return
    what = f"checkpoints up to step {max(found)}" if found else f"a finished one, {_STATE}"
    raise ValueError(
        f"`--output_dir` must not hold another run, got {os.fspath(output_dir)!r} with {what}. To go on with it: "
        "`--resume_from_checkpoint auto`. To delete it and start anew: `--overwrite_output_dir`. Or name another."
    )


def clear_output_dir(output_dir: str | Path) -> None:
    """Delete the checkpoints of another run, and the files that a report reads."""
    for folder in checkpoints(Path(output_dir)).values():
        remove(folder)
    for name in _OF_A_RUN:
        (Path(output_dir) / name).unlink(missing_ok=True)
