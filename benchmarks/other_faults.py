"""Disturbs trainings once, in all ways but SIGKILL at a random moment (see `faults.py`), and starts them again.

    python benchmarks/other_faults.py
    python benchmarks/other_faults.py --trainers gdc --faults sigterm reward-hangs

Each training is that of `faults.py`. After a fault it is started again with `resume_from_checkpoint="auto"`; weights,
optimizer and logged metrics must be equal bit for bit to those of an undisturbed run. A step whose gradient is not
finite is skipped, so runs with this fault are not compared.
"""

import argparse
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import faults
import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from rlhf_bayes.testing import toy_reward
from rlhf_bayes.trainers.faults.whole_checkpoints import checkpoints

fork = multiprocessing.get_context("fork")
SAYS = ("SIGTERM: saved", "go on from it", "not written to the end", "step is skipped", "called again")
STEP = 5  # between two checkpoints


@dataclass(frozen=True)
class Fault:
    """A fault, the trainers that it concerns, and their settings."""

    happens: str
    trainers: tuple[str, ...] = faults.TRAINERS
    options: dict[str, Any] = field(default_factory=dict)
    act: Callable[[Any], None] | None = None  # called with the trainer before it trains
    reward: Callable[..., list[float]] = toy_reward
    num_processes: int = 1
    afterwards: Callable[[Path], None] | None = None  # called with the folder after the process has ended
    equal: bool = True  # whether the run must end equal to an undisturbed one


class AtStep(TrainerCallback):
    def __init__(self, act: Callable[[], None]):
        self.act = act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEP:
            self.act()


def signalled(trainer, number: int, rank: int = 0) -> None:
    if trainer.accelerator.process_index == rank:
        trainer.add_callback(AtStep(lambda: os.kill(os.getpid(), number)))


def out_of_disk(trainer) -> None:
    """Limit the size of files, as if the disk were full."""
    trainer.add_callback(AtStep(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))))


def spoilt(trainer, *steps: int) -> None:
    """Make an entry of the gradient nan at these steps."""
    parameter = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda gradient: gradient * (math.nan if trainer.state.global_step in steps else 1.0))


def cut(folder: Path) -> None:
    newest = list(checkpoints(folder).values())[-1]
    os.truncate(newest / "optimizer.pt", 100)
    (folder / "result.pt").unlink()


def unreliable(act: Callable[[int], None]) -> Callable[..., list[float]]:
    """The toy's reward, which first calls `act` with the number of the call, from a late call on."""
    late = []

    def toy_reward_(prompts, completions, completion_ids, trainer_state, **columns):
        if trainer_state.global_step >= STEP:
            late.append(trainer_state.global_step)
            act(len(late))
        return toy_reward(prompts, completions, completion_ids)

    toy_reward_.__name__ = toy_reward.__name__  # metrics are named after the function
    return toy_reward_


def raises(late: int) -> None:
    raise ConnectionError("the judge is away")


def once(late: int) -> None:
    if late == 1:
        raises(late)


def hangs(late: int) -> None:
    time.sleep(3600)


ROLLOUTS = ("ppo", "gdc")
FAULTS = {
    "sigterm": Fault(
        "SIGTERM, asked to save", options={"save_on_sigterm": True}, act=partial(signalled, number=signal.SIGTERM)
    ),
    "cut": Fault("the newest checkpoint is cut", afterwards=cut),
    "disk-full": Fault("no space for a checkpoint", act=out_of_disk),
    "nan": Fault("a gradient is nan", act=lambda trainer: spoilt(trainer, STEP), equal=False),
    "nans": Fault("three in a row are", act=lambda trainer: spoilt(trainer, *range(STEP, STEP + 3)), equal=False),
    "reward-fails-once": Fault("a reward raises once", ROLLOUTS, {"reward_retries": 1}, reward=unreliable(once)),
    "reward-fails": Fault("a reward raises", ROLLOUTS, reward=unreliable(raises)),
    "reward-hangs": Fault("a reward hangs", ROLLOUTS, {"reward_timeout": 1.0}, reward=unreliable(hangs)),
    "process": Fault(
        "one process of two is killed", ROLLOUTS, {"per_device_train_batch_size": 6},
        partial(signalled, number=signal.SIGKILL, rank=1), num_processes=2
    ),
}  # fmt: skip


def work(kind: str, folder: Path, fault: Fault, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    out = os.open(folder / f"said-{environment.get('RANK', 0)}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 2)
    faults.run(kind, folder, fault.act, fault.reward, **fault.options)


def train(kind: str, folder: Path, fault: Fault) -> list[int]:
    """The processes' exit statuses."""
    num_processes = fault.num_processes
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {
            "WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    processes = [fork.Process(target=work, args=(kind, folder, fault, own if len(ranks) > 1 else {})) for own in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def said(folder: Path) -> str:
    """The last line of the log that says what the trainer did about the fault, without the path."""
    lines = [
        line.replace(f"{folder}/", "") for path in folder.glob("said-*") for line in path.read_text().splitlines()
    ]
    return next((line.strip() for line in reversed(lines) if any(what in line for what in SAYS)), "")


def disturbed(kind: str, fault: Fault, folder: Path) -> tuple[str, str, str]:
    """Exit statuses, the last line of the log, and whether the run ended equal to an undisturbed one."""
    nothing = replace(fault, act=None, reward=toy_reward)
    whole, run = folder / f"whole-{fault.num_processes}", folder / "run"
    if not whole.exists():
        train(kind, whole, nothing)
    codes = train(kind, run, fault)
    words = said(run)
    if fault.afterwards is not None:
        fault.afterwards(run)
    if not (run / "result.pt").exists():
        train(kind, run, nothing)
        words = words or said(run)
    results = [torch.load(path / "result.pt", weights_only=True) for path in (run, whole)]
    shutil.rmtree(run)
    return str(codes), words, "yes" if faults.same(*results) else "no" if fault.equal else "no, steps were skipped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", choices=faults.TRAINERS, default=faults.TRAINERS)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    args = parser.parse_args()
    table = Table("trainer", "fault", "exit status", "says", "equal to an undisturbed run", show_lines=True)
    for kind in args.trainers:
        with tempfile.TemporaryDirectory() as folder:
            for fault in (FAULTS[name] for name in args.faults):
                if kind in fault.trainers:
                    table.add_row(kind, fault.happens, *disturbed(kind, fault, Path(folder)))
    Console().print(table)
    sys.exit("no" in table.columns[-1].cells)


if __name__ == "__main__":
    main()
