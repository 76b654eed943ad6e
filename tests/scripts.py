"""Runs a script as a user does, in a process of its own. Not a test module."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_script(
    script: Path, *flags: object, cwd: Path, launcher: Sequence[str] = (sys.executable,), columns: int = 120
) -> str:
    """What it prints, on a terminal of so many columns; it must end well."""
    done = subprocess.run(
        [*launcher, str(script), *map(str, flags)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": str(columns)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
