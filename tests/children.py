"""
Processes that tests start, and how tests wait for them: as long as they make progress. Not a test module.

A fixed time limit fails on a machine with other work on it. A process makes progress when it writes a file that is
watched or uses another `CPU_STEP` seconds of CPU time; both continue on a slow machine and stop in a process that
hangs.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

STALLED_AFTER = 300.0  # seconds without progress
CPU_STEP = 10.0  # seconds; a launcher that only polls its workers uses about 3 in `STALLED_AFTER`
MAX_CPU_TIME = 3600.0  # seconds; an endless loop makes progress too
POLL_INTERVAL = 0.02  # seconds
# a launcher prefers a visible GPU, where nothing here should run
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def cpu_time(pids: Iterable[int]) -> float:
    """Seconds of CPU time used by processes and their descendants."""
    total = 0.0
    for pid in pids:
        try:
            parent = psutil.Process(pid)
            for process in [parent, *parent.children(recursive=True)]:
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        except psutil.NoSuchProcess:
            continue  # it ended between two calls
    return total


def bytes_in(paths: Iterable[Path]) -> int:
    """Size of files and of all files in folders."""
    total = 0
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            try:
                total += file.stat().st_size
            except OSError:
                continue  # checkpoints are renamed and deleted meanwhile
    return total


def wait_until(condition: Callable[[], bool], pids: Sequence[int], watched: Sequence[Path] = ()) -> None:
    """
    Wait for a condition as long as any of the processes makes progress.

    Args:
        condition: Asked fifty times a second. To notice the end of the processes is its business.
        pids: Processes whose CPU time is progress; that of their descendants too.
        watched: Files and folders whose growth is progress.

    Raises:
        TimeoutError: Nothing was written and hardly any CPU time used for `STALLED_AFTER` seconds, or the processes
            have used more than `MAX_CPU_TIME` seconds.
    """
    progress, since, asked = None, time.monotonic(), 0.0
    while not condition():
        now = time.monotonic()
        if now - asked > 1.0:
            asked, used = now, cpu_time(pids)
            current = (used // CPU_STEP, bytes_in(watched))
            if current != progress:
                progress, since = current, now
            if used > MAX_CPU_TIME:
                raise TimeoutError(f"Processes {pids} have used {used:.0f} seconds of CPU time.")
        if now - since > STALLED_AFTER:
            raise TimeoutError(f"Processes {pids} have made no progress for {STALLED_AFTER:.0f} seconds.")
        time.sleep(POLL_INTERVAL)


@contextmanager
def started(command: Sequence[object], errors: Path) -> Iterator[subprocess.Popen]:
    """A process whose stderr goes to a file. It and its descendants are killed at the end."""
    with errors.open("w") as file:
        process = subprocess.Popen(
            [str(word) for word in command], env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=file
        )
        try:
            yield process
        finally:
            kill(process)


def run(command: Sequence[object], cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """
    `subprocess.run` with captured text and, in place of a time limit, `wait_until`.

    Raises:
        TimeoutError: The process made no progress; its output is in the error.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        out, errors = (Path(folder) / name for name in ("stdout", "stderr"))
        with out.open("w") as out_file, errors.open("w") as errors_file:
            process = subprocess.Popen(
                words, cwd=cwd, env=os.environ | ENVIRONMENT | environment, stdout=out_file, stderr=errors_file
            )
            try:
                wait_until(lambda: process.poll() is not None, [process.pid], [out, errors])
            except TimeoutError as error:
                error.add_note(out.read_text()[-3000:] + errors.read_text()[-3000:])
                raise
            finally:
                kill(process)
        return subprocess.CompletedProcess(words, process.returncode, out.read_text(), errors.read_text())


def kill(process: subprocess.Popen) -> None:
    """Kill a process that still runs, with its descendants."""
    if process.poll() is None:
        for descendant in psutil.Process(process.pid).children(recursive=True):
            descendant.kill()
        process.kill()
        process.wait()
