"""Children are waited for by their progress, and tests that start them carry the marker `processes`."""

import sys
import time

import psutil
import pytest

from . import children

LOOP = "import time\nfor _ in range({}): time.sleep(0.2); print('step', flush=True)"


@pytest.mark.processes
def test_a_slow_child_that_writes_is_waited_for(monkeypatch):
    monkeypatch.setattr(children, "STALLED_AFTER", 3.0)
    begin = time.monotonic()
    done = children.run([sys.executable, "-c", LOOP.format(30)])
    assert time.monotonic() - begin > children.STALLED_AFTER
    assert done.stdout.count("step") == 30


@pytest.mark.processes
def test_a_slow_child_that_computes_is_waited_for(monkeypatch):
    monkeypatch.setattr(children, "STALLED_AFTER", 3.0)
    monkeypatch.setattr(children, "CPU_STEP", 0.05)
    code = "import time\nwhile time.process_time() < 4: pass"
    assert children.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.processes
def test_a_child_that_hangs_is_killed_with_its_own_children(monkeypatch, tmp_path):
    monkeypatch.setattr(children, "STALLED_AFTER", 3.0)
    monkeypatch.setattr(children, "CPU_STEP", 0.05)
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('about to hang', flush=True)\n"
        "time.sleep(1000)"
    )
    with pytest.raises(TimeoutError, match="no progress for 3 seconds") as caught:
        children.run([sys.executable, "-c", code])
    assert "about to hang" in caught.value.__notes__[0]
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.processes
def test_an_endless_loop_is_ended(monkeypatch):
    monkeypatch.setattr(children, "MAX_CPU_TIME", 1.0)
    with pytest.raises(TimeoutError, match="seconds of CPU time"):
        children.run([sys.executable, "-c", "while True: print('x' * 1000)"])


def test_a_child_needs_the_marker():
    with pytest.raises(RuntimeError, match="marker `processes`"):
        children.run([sys.executable, "-c", ""])
