"""SIGKILL, SIGTERM and failing rewards, in processes of their own: nothing hangs, and nothing is lost."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from rlhf_bayes.trainers.faults.whole_checkpoints import checkpoints, defect

from ...benchmarks.scripts import BENCHMARKS
from ...children import started, wait_until
from ...scripts import run_script

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("scenarios.py")
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
GO_ON = "go on from it with `resume_from_checkpoint=True`"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenarios")
    run_script(SCRIPT, folder, cwd=folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("kind", ["ppo", "gdc", "reward", "two"])
def test_sigterm_saves_and_exits_with_0_when_asked(kind, found):
    run = found[f"sigterm {kind}"]
    assert run["codes"] == run["resumed"] == ([0, 0] if kind == "two" else [0])
    step = run["whole"][-1]
    assert step > 5  # 5 was there when it was asked
    assert f"SIGTERM: saved at step {step}." in run["said"][0]


def test_sigterm_ends_at_once_otherwise(found):
    run = found["sigterm unasked"]
    assert run["codes"] == [-signal.SIGTERM]
    assert run["whole"]


@pytest.mark.parametrize(("name", "killed"), [("killed 0", 0), ("killed 1", 1), ("killed reward", 1)])
def test_when_one_process_is_killed_the_other_ends_with_a_message(name, killed, found):
    run = found[name]
    assert run["codes"][killed] == -signal.SIGKILL
    assert run["codes"][1 - killed] == 1
    assert GO_ON in run["said"][1 - killed]


@pytest.mark.parametrize("kind", ["ppo", "gdc"])
def test_a_reward_that_fails_in_one_process_stops_all_with_a_checkpoint(kind, found):
    run = found[f"reward fails {kind}"]
    assert run["codes"] == [1, 1]
    assert run["whole"] == [3]
    assert "In another process: ConnectionError: the judge is away" in run["said"][0]
    assert "ConnectionError: the judge is away" in run["said"][1]
    assert all(GO_ON in said for said in run["said"])
    assert run["resumed"] == [0, 0]
    assert run["same"]


def test_a_launcher_ends_the_others_when_one_is_killed(tmp_path):
    errors = tmp_path / "errors"

    def saved():
        assert launcher.poll() is None, errors.read_text()[-3000:]
        return any(not defect(folder) for folder in checkpoints(tmp_path).values())

    with started([sys.executable, *LAUNCH, SCRIPT, tmp_path, "launched"], errors) as launcher:
        wait_until(saved, [launcher.pid], [tmp_path])
        pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
        os.kill(pids[1], signal.SIGKILL)
        wait_until(lambda: launcher.poll() is not None, [launcher.pid], [tmp_path])
    said = errors.read_text()
    assert launcher.returncode != 0
    # The other process meets the broken connection, or the launcher ends it before that.
    assert GO_ON in said or f"Sending process {pids[0]} closing signal SIGTERM" in said
    assert "Signal 9" in said  # the launcher
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_killed_at_random_moments_a_run_ends_like_one_that_was_not(tmp_path):
    script = BENCHMARKS / "faults.py"
    printed = run_script(script, "--kills", 3, cwd=tmp_path)
    rows = [line.replace("│", " ").split() for line in printed.splitlines() if line.startswith("│")]
    assert [(row[0], row[1], row[-1]) for row in rows[-3:]] == [(kind, "3", "0") for kind in ("ppo", "gdc", "reward")]


def test_disturbed_in_other_ways_too(tmp_path):
    faults = ("sigterm", "cut", "nan", "reward-fails")
    printed = run_script(
        BENCHMARKS / "other_faults.py", "--trainers", "gdc", "--faults", *faults, cwd=tmp_path, columns=300
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert [(row[2], row[4]) for row in rows] == [
        ("[0]", "yes"), ("[0]", "yes"), ("[0]", "no, steps were skipped"), ("[1]", "yes"),
    ]  # fmt: skip
    for row, words in zip(
        rows, ("SIGTERM: saved at step", "has 100 bytes", "(1 in a row", "go on from it"), strict=True
    ):
        assert words in row[3]
