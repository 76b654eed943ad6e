"""GDC with options that not every engine of `tests/scale` allows: one process and two take the same steps."""

import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.store import CompletionStore
from rlhf_bayes.testing import EnumerableLM

from ..children import run
from ..store.stored import drawn, provenance

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SCRIPT = str(Path(__file__).with_name("launched.py"))
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def launched(folder: Path, num_processes: int, mode: str) -> dict:
    launcher = LAUNCH if num_processes > 1 else []
    done = run([sys.executable, *launcher, SCRIPT, folder, mode, num_processes])
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "weights.pt")


def make_store(path):
    """Draws of a policy that moves, in files of a third more groups than a step needs."""
    toy = EnumerableLM(vocab_size=4, max_completion_length=3)
    store = CompletionStore.create(path, provenance(toy))
    for step in range(6):
        log_probs = toy.log_probs(toy.random_policy(noise=0.02 * step, seed=step)).detach()
        rows = drawn(toy, log_probs, 5, f"policy at step {step}", seed=step, step=step // 2)
        store.append(rows, f"{step}")


def test_two_processes_approach_the_posterior_as_one(tmp_path):
    make_store(tmp_path / "store")
    runs = [launched(tmp_path / str(n), n, "gdc") for n in (1, 2)]
    for one, two in zip(*(trained.values() for trained in runs), strict=True):
        for name, weight in one["weights"].items():
            assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if "eval_loss" in one:
            assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
        for ours, theirs in zip(two["log"], one["log"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    for trained in runs:
        for name, weight in trained["actors"]["weights"].items():
            assert torch.equal(trained["actors, resumed"]["weights"][name], weight), name
