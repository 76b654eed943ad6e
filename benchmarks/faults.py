"""Kills trainings at random moments, resumes them, and compares their results with those of an undisturbed run.

    python benchmarks/faults.py --kills 50

Each trainer learns on the enumerable toy, with a checkpoint every other step, in the middle of rollouts too. Its
process is killed with SIGKILL after a random time and started again with `resume_from_checkpoint="auto"`, until it was
killed `--kills` times; a run that ends before is compared and started anew. Weights, optimizer and logged metrics must
be equal bit for bit.
"""

import argparse
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer
from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.testing import EnumerableLM, toy_reward
from rlhf_bayes.trainers.faults.whole_checkpoints import checkpoints, defect

STEPS = 24
COMMON = {
    "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True,
    "max_steps": STEPS, "learning_rate": 1e-2, "optim": "adamw_torch", "logging_steps": 3, "save_strategy": "steps",
    "save_steps": 2, "save_total_limit": 2,
}  # fmt: skip
# four optimizer steps per rollout, so that every other checkpoint is in the middle of one
ROLLOUTS = {
    **COMMON, "max_completion_length": 3, "num_generations": 8, "per_device_train_batch_size": 12,
    "steps_per_generation": 2, "num_iterations": 2,
}  # fmt: skip
TRAINERS = ("ppo", "gdc", "reward")
# entries of Trainer that a resumed run measures anew
NOT_COMPARED = ("loss", "_runtime", "_per_second", "step_time", "total_flos")


def make(kind: str, folder: Path, reward: Callable[..., list[float]], **changes: Any):
    """A trainer that uses everything that a checkpoint must hold; `changes` are made to its configuration."""
    toy = EnumerableLM(vocab_size=4, max_completion_length=3)
    if kind == "reward":
        return make_reward(toy, folder, changes)
    settings = ROLLOUTS | changes
    data = {"train_dataset": Dataset.from_dict({"prompt": toy.prompts}), "processing_class": toy.tokenizer}
    if kind == "ppo":
        args = PPOConfig(str(folder), beta=0.5, target_kl=0.05, kl_horizon=100, critic="separate", **settings)
        return PPOTrainer(toy.random_policy(noise=0.0), reward, args, **data)
    args = GDCConfig(
        str(folder), beta=0.5, divergence="log_variance", replay_batches=3, proposal="adaptive", **settings
    )
    return GDCTrainer(toy.random_policy(noise=0.0), reward, args, **data)


def make_reward(toy: EnumerableLM, folder: Path, changes: dict[str, Any]) -> RewardTrainer:
    texts = [text for text in dict.fromkeys(toy.completions) if text]
    pairs = Dataset.from_dict(
        {
            "chosen": [texts[(3 * i) % len(texts)] for i in range(32)],
            "rejected": [texts[(3 * i + 1) % len(texts)] for i in range(32)],
            "annotators": [["u", "v", "w"]] * 32,
            "annotator_votes": [["chosen", "tie", "chosen"], ["rejected", "chosen", "rejected"]] * 16,
        }
    )
    args = RewardConfig(
        str(folder), num_members=3, annotator_reliability=True, per_device_train_batch_size=4, **COMMON | changes
    )
    return RewardTrainer(toy.save(folder / "base"), args, train_dataset=pairs, processing_class=toy.tokenizer)


def run(
    kind: str,
    folder: Path,
    prepare: Callable[[Any], None] | None = None,
    reward: Callable[..., list[float]] = toy_reward,
    **changes: Any,
) -> None:
    """
    Train to the end, from the last whole checkpoint of the folder, and save the results in result.pt.

    Args:
        kind, folder, reward: As in [`make`].
        prepare (`Callable`, *optional*): Called with the trainer before it trains.
        changes: Changes of the configuration.
    """
    quiet(threads=1)
    logging.getLogger("rlhf_bayes").setLevel(logging.WARNING)  # `other_faults.py` shows what the trainers say
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    trainer = make(kind, folder, reward, **changes)
    if prepare is not None:
        prepare(trainer)
    trainer.train(resume_from_checkpoint="auto")
    metrics = [
        {name: value for name, value in entry.items() if not name.endswith(NOT_COMPARED)}
        for entry in trainer.state.log_history[:-1]  # the last entry is a summary of this process alone
    ]
    result = {"weights": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict(), "metrics": metrics}
    torch.save(result, folder / "result.part")
    os.replace(folder / "result.part", folder / "result.pt")


def same(first, second) -> bool:
    """Whether two nested results are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def disturbed(kind: str, folder: Path, kills: int, seed: int) -> Counter:
    """Counts of what happened; `differences` should be 0."""
    fork = multiprocessing.get_context("fork")  # forked processes need not import the libraries again
    generator, counts = random.Random(seed), Counter()
    start = time.monotonic()
    whole = fork.Process(target=run, args=(kind, folder / "whole"))
    whole.start()
    whole.join()
    duration = time.monotonic() - start
    expected = torch.load(folder / "whole" / "result.pt", weights_only=True)
    while True:
        lap = folder / f"lap-{counts['runs']}"
        process = fork.Process(target=run, args=(kind, lap))
        process.start()
        if counts["kills"] < kills:
            process.join(generator.uniform(0.1, 0.8) * duration)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                counts["kills"] += 1
        process.join()
        found = list(checkpoints(lap).values())
        if process.exitcode == -signal.SIGKILL:
            counts["before the first checkpoint"] += not found
            counts["while saving"] += any(map(defect, found))
            continue
        if process.exitcode != 0:
            raise SystemExit(f"{kind}: a run in {lap} ended with status {process.exitcode}.")
        counts["runs"] += 1
        counts["differences"] += not same(torch.load(lap / "result.pt", weights_only=True), expected)
        if counts["kills"] >= kills:
            return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each trainer")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    columns = ("kills", "before the first checkpoint", "while saving", "runs", "differences")
    table = Table("trainer", *columns, title="SIGKILL at random moments")
    differences = 0
    for kind in args.trainers:
        with tempfile.TemporaryDirectory() as folder:
            counts = disturbed(kind, Path(folder), args.kills, args.seed)
        table.add_row(kind, *(str(counts[column]) for column in columns))
        differences += counts["differences"]
    Console().print(table)
    raise SystemExit(1 if differences else 0)


if __name__ == "__main__":
    main()
