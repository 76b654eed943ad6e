"""Children are waited for by their progress, and tests that start them carry the marker `processes`."""

import sys
from types import SimpleNamespace

import psutil
import pytest

from . import children


class Clock:
    """A clock that only `sleep` moves, and the CPU time of a child that uses a share of it."""

    def __init__(self, monkeypatch, share=0.0):
        self.now = 0.0
        monkeypatch.setattr(children, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(children, "POLL_INTERVAL", 0.5)
        monkeypatch.setattr(children, "cpu_time", lambda pids: share * self.now)

    def sleep(self, seconds):
        self.now += seconds


def test_a_slow_child_that_writes_is_waited_for(monkeypatch, tmp_path):
    clock, output = Clock(monkeypatch), tmp_path / "output"

    def ended():
        if clock.now % 200 == 0:
            with output.open("a") as file:
                file.write("step\n")
        return clock.now > 10 * children.STALLED_AFTER

    children.wait_until(ended, [1], [tmp_path])
    assert output.read_text().count("step") > 10


def test_a_slow_child_that_computes_is_waited_for(monkeypatch):
    clock = Clock(monkeypatch, share=0.05)
    children.wait_until(lambda: clock.now > 10 * children.STALLED_AFTER, [1])


@pytest.mark.parametrize("share", [0.0, 0.01])  # the second is a launcher that polls its workers
def test_a_child_that_does_neither_is_given_up(monkeypatch, share, tmp_path):
    clock = Clock(monkeypatch, share)
    with pytest.raises(TimeoutError, match="no progress for 300 seconds"):
        children.wait_until(lambda: False, [1], [tmp_path])
    assert clock.now <= 2.1 * children.STALLED_AFTER


def test_an_endless_loop_is_given_up(monkeypatch):
    Clock(monkeypatch, share=1.0)
    with pytest.raises(TimeoutError, match=r"have used 36\d\d seconds of CPU time"):
        children.wait_until(lambda: False, [1])


@pytest.mark.processes
def test_a_child_that_hangs_is_killed_with_its_own_children(monkeypatch, tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "print('about to hang', flush=True)\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(1000)"
    )

    def hang(condition, pids, watched):
        real_wait(lambda: pid_file.exists() and pid_file.stat().st_size > 0, pids, watched)
        raise TimeoutError("no progress")

    real_wait = children.wait_until
    monkeypatch.setattr(children, "wait_until", hang)
    with pytest.raises(TimeoutError, match="no progress") as caught:
        children.run([sys.executable, "-c", code])
    assert "about to hang" in caught.value.__notes__[0]
    pid = int(pid_file.read_text())
    real_wait(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, [])


@pytest.mark.processes
def test_cpu_time_is_that_of_descendants_too():
    code = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', {!r}]); time.sleep(1000)"
    loop = "import time\nwhile time.process_time() < 0.8: pass"
    process = children.subprocess.Popen([sys.executable, "-c", code.format(loop)])
    try:
        children.wait_until(lambda: children.cpu_time([process.pid]) > 0.5, [process.pid])
    finally:
        children.kill(process)


def test_a_child_needs_the_marker():
    with pytest.raises(RuntimeError, match="marker `processes`"):
        children.run([sys.executable, "-c", ""])
