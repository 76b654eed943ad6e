"""Runs a script as a user does, in a process of its own, or loads it. Not a test module."""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from .children import run


def run_script(
    script: Path, *flags: object, cwd: Path, launcher: Sequence[str] = (sys.executable,), columns: int = 120
) -> str:
    """What it prints, on a terminal of so many columns; it must end well."""
    done = run([*launcher, script, *flags], cwd=cwd, COLUMNS=str(columns))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def loaded_script(script: Path) -> Iterator[ModuleType]:
    """The script as a module, whose `main` is not run."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[script.stem]
