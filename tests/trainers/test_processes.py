"""One process and two take the same steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

SCRIPT = str(Path(__file__).with_name("launched.py"))
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def launched(folder: Path, num_processes: int, mode: str = "table") -> dict:
    # the launcher prefers a visible GPU, where nothing here should run
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = LAUNCH if num_processes > 1 else []
    command = [sys.executable, *launcher, SCRIPT, str(folder), mode, str(num_processes)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(folder / "weights.pt")


def test_two_processes_take_the_steps_of_one(tmp_path):
    one, two = (launched(tmp_path / str(n), n) for n in (1, 2))
    assert one["beta"] == pytest.approx(two["beta"], rel=1e-6)
    assert one["beta"] != 0.5
    for name, weight in one["weights"].items():
        assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for ours, theirs in zip(two["log"], one["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_two_processes_approach_the_posterior_as_one(tmp_path):
    runs = (launched(tmp_path / str(n), n, "gdc") for n in (1, 2))
    for one, two in zip(*(run.values() for run in runs), strict=True):
        for name, weight in one["weights"].items():
            assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
        for ours, theirs in zip(two["log"], one["log"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("mode", ["pairs", "pairs-lora"])
def test_two_processes_train_the_reward_of_one(tmp_path, mode):
    one, two = (launched(tmp_path / str(n), n, mode) for n in (1, 2))
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        assert_close(two["weights"][name], weight, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)
