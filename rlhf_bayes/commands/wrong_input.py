"""Tells errors of the user's input, whose message says all, from errors that need their traceback."""

import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_FILLS_FLAGS = {"__post_init__", "parse_args_into_dataclasses"}


def in_a_line(error: Exception) -> str | None:
    """
    What to print of an error in place of its traceback; None where the traceback is needed.

    A line is enough for what this package refuses, for what the configurations of its libraries refuse, and for files
    that are not there. An error in which code of the user takes part, a reward function say, keeps its traceback.
    """
    if not isinstance(error, OSError | TypeError | ValueError):
        return None
    if any(
        _is_of_the_user(frame.filename) for one in _chain(error) for frame in traceback.extract_tb(one.__traceback__)
    ):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    refused = bool(frames) and _is_within(frames[-1].filename, _PACKAGE)
    if not (refused or isinstance(error, OSError) or any(frame.name in _FILLS_FLAGS for frame in frames)):
        return None
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_the_user(filename: str) -> bool:
    """Whether code is neither of this package, nor of the standard library, nor of an installed library."""
    if filename.startswith("<"):  # made by exec, such as the `__init__` of a dataclass
        return False
    installed = {"site-packages", "dist-packages"} & set(Path(filename).parts)
    library = sysconfig.get_paths()["stdlib"]
    return not (installed or _is_within(filename, _PACKAGE) or _is_within(filename, Path(library).resolve()))


def _is_within(filename: str, folder: Path) -> bool:
    return Path(filename).resolve().is_relative_to(folder)
