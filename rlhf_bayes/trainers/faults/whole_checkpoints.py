"""
Checkpoints that record that they were written to the end.

A process may be killed, or a disk may fill up, while a checkpoint is written, and its folder does not show what is
missing. Therefore a list of its files with their sizes is written last. A folder without this list, or with other
files than it names, is not used.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Flush all files of a checkpoint to the disk, then write the list that declares it whole."""
    sizes = {}
    for path in _files(folder):
        _flush(path)  # otherwise a file may have its size, but not its content, after a power cut
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps({"saved_at": time.time(), "files": sizes}, indent=1), encoding="utf-8")
    _flush(part)
    os.replace(part, folder / MANIFEST)
    _flush(folder)


def is_sealed(folder: Path) -> bool:
    """Whether a checkpoint was declared whole once. Checkpoints of other trainers were not."""
    return (folder / MANIFEST).is_file()


def defect(folder: Path) -> str | None:
    """Why a checkpoint is not whole, in words; None if it is whole."""
    if not is_sealed(folder):
        return f"`{MANIFEST}`, which is written last, is missing"
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"`{MANIFEST}` cannot be read"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"`{name}` is missing"
        if path.stat().st_size != size:
            return f"`{name}` has {path.stat().st_size} bytes of {size}"
    return None


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """All checkpoints in a folder, whole or not: step -> folder, in the order of the steps."""
    if not output_dir.is_dir():
        return {}
    found = {int(match[1]): path for path in output_dir.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    return {step: found[step] for step in sorted(found) if found[step].is_dir()}


def whole_checkpoints(output_dir: Path) -> dict[int, Path]:
    """The whole checkpoints in a folder: step -> folder. A warning names each of the others."""
    whole = {}
    for step, folder in checkpoints(output_dir).items():
        reason = defect(folder)
        if reason is None:
            whole[step] = folder
        else:
            logger.warning(f"`{folder}` is skipped, because it was not written to the end: {reason}.")
    return whole


def remove(folder: Path) -> None:
    """Delete a checkpoint. Its list of files goes first, so that a half-deleted one is not taken for a whole one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: Collection[Path]) -> None:
    """
    Delete checkpoints down to `limit`: first those that are not whole, then those that were written first.

    Args:
        output_dir (`Path`):
            Where they are.
        limit (`int`, *optional*):
            How many to keep; None or 0 keeps all.
        keep (`Collection[Path]`):
            Checkpoints that are never deleted: the newest and the best.
    """
    if not limit:
        return
    found = list(checkpoints(output_dir).values())
    kept = {folder.resolve() for folder in keep}
    for folder in sorted((folder for folder in found if folder.resolve() not in kept), key=_saved_at):
        if len(found) <= limit:
            return
        found.remove(folder)
        remove(folder)


def _saved_at(folder: Path) -> float:
    return 0.0 if defect(folder) else json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["saved_at"]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
