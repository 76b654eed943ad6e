"""
How close trainers come to the posterior of a real model, at equal completions, with errors.

    python benchmarks/real_posterior.py --shared ../shared                   all tasks and methods
    python benchmarks/real_posterior.py --task stories --method RLOO --method PPO --seeds 1
    python benchmarks/real_posterior.py --task stories --method 'ppo:{"lam": 0.95}' --learning-rates 2e-5 5e-5
    python benchmarks/real_posterior.py --samples 25600 --output runs/real_posterior_25600
    python benchmarks/real_posterior.py --plan                               how many runs, without running them

`--shared` holds `models/stories260K`, `models/bitstories3M` and `data/`, which are not part of this repository. Tasks
are in `real_tasks.py`. Every method draws the same number of completions in batches of 64 with 8 a prompt, with Adam,
linear decay and a gradient norm of at most 0.1.

- The learning rate of each method is chosen on each task by KL(π‖π*) of one run a rate with a seed of its own. Where
  the best rate is at the edge of the set, the set grows. The verdict comes from other seeds and other draws. A model
  of smaller weights has smaller rates (`RATE_SCALES` in `real_tasks.py`).
- Distances are computed by `posterior_distances.py`, with log Z from draws of the prior, and do not use the metrics
  of the trainers. The trainer's own `posterior/gap` stands beside the truth.
- ± is one standard error clustered by prompt. That of a difference is of the prompts' differences, and includes the
  error over seeds.
- Each result is a file in `--output`, so an interrupted run goes on where it was, and a new method is a new row.
  After a change of a trainer, `--fresh` trains anew.

A method is a name of `METHODS`, to which a setting is added as one record, or `ppo`, `gdc`, `rloo`, `grpo` with any
fields of its config as JSON.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from real_posterior_worker import Method, Run, Sizes, Target, check_samples, measure
from real_report import choices_of, write_report
from real_tasks import RATE_SCALES, TASKS, Folders
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.trainers.rollout.rollout_config import FIRST_RATE

FOUR_BY_FOUR = {"num_iterations": 4, "steps_per_generation": 4}
LORA_RATES = (2e-4, 5e-4, 1e-3)
MANY_UPDATES = (5e-6, 1e-5, 2e-5)  # learning rates where a batch is used several times
REPLAYED = {"divergence": "log_variance", "replay_batches": 8, "num_iterations": 4}
ADAPTED = {"adapt_learning_rate": True}  # from `FIRST_RATE` on, as where no learning rate is given
METHODS: dict[str, Method] = {
    "RLOO": Method("rloo"),
    "RLOO, 4 epochs × 4 minibatches": Method("rloo", FOUR_BY_FOUR, MANY_UPDATES),
    "GRPO": Method("grpo"),
    "GRPO, rewards not scaled": Method("grpo", {"scale_rewards": "none"}),
    "PPO, default learning rate": Method("ppo", ADAPTED, (FIRST_RATE,)),
    "GDC, js, default learning rate": Method("gdc", {"divergence": "js"} | ADAPTED, (FIRST_RATE,)),
    "GDC, forward KL, default learning rate": Method("gdc", {"divergence": "forward_kl"} | ADAPTED, (FIRST_RATE,)),
    "GDC, log-variance, default learning rate": Method("gdc", REPLAYED | ADAPTED, (FIRST_RATE,)),
    "PPO, LoRA, default learning rate": Method("ppo", ADAPTED, (FIRST_RATE,), lora=True),
    "PPO": Method("ppo"),
    "PPO, LoRA": Method("ppo", {}, LORA_RATES, lora=True),
    "PPO, without rewards of prefixes": Method("ppo", {"prefix_rewards": False}),
    "PPO, a value head as critic": Method("ppo", {"critic": "shared"}),
    "PPO, 4 epochs × 4 minibatches": Method("ppo", FOUR_BY_FOUR, MANY_UPDATES),
    "PPO, TRL's learning rate": Method("ppo", {}, (1e-6,)),
    "GDC, js": Method("gdc", {"divergence": "js"}),
    "GDC, forward KL": Method("gdc", {"divergence": "forward_kl"}),
    "GDC, reverse KL": Method("gdc", {"divergence": "reverse_kl"}),
    "GDC, log-variance, window of 8, 4 epochs": Method("gdc", REPLAYED, (1e-5, 2e-5, 5e-5)),
}
FIRST_CHOICE_SEED = 1000  # seeds of the runs that choose the learning rate start here
MOST_EXTENSIONS = 4  # of the set of learning rates
Results = dict[Run, dict[str, Any]]


def next_rate(rate: float, up: bool) -> float:
    """The next learning rate in the series 1, 2, 5, 10."""
    series = [float(f"{digit}e{power}") for power in range(-9, 1) for digit in (1, 2, 5)]
    return next(x for x in series if x > 1.01 * rate) if up else next(x for x in reversed(series) if x < 0.99 * rate)


def extended(by_rate: dict[float, float]) -> float | None:
    """The rate to try next where the best of those tried, rate -> nats, is the lowest or the highest."""
    rates, best = sorted(by_rate), min(by_rate, key=by_rate.__getitem__)
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    return next_rate(best, up=best == rates[-1])


def rates_of(args: argparse.Namespace, task: str, method: Method) -> list[float]:
    """The learning rates to begin with, ascending. Those of a flag and a single one are taken as they are."""
    scale = 1.0 if args.learning_rates or len(method.learning_rates) == 1 else RATE_SCALES.get(task, 1.0)
    return [float(f"{scale * rate:.6g}") for rate in method.learning_rates]


def still_needed(args: argparse.Namespace, results: Results) -> list[Run]:
    """The runs that can start with what is known: those that choose a learning rate, then those of the verdict."""
    needed = []
    for task in args.tasks:
        for name, method in args.methods.items():
            run = partial(Run, task, name, method, sizes=args.sizes)
            choice = [
                run(learning_rate=rate, seed=args.choice_seed, for_verdict=False)
                for rate in rates_of(args, task, method)
            ]
            if len(choice) > 1:
                missing = [candidate for candidate in choice if candidate not in results]
                if missing:
                    needed += missing
                    continue
                by_rate = choices_of(results, task, name)
                rate = extended(by_rate) if len(by_rate) < len(choice) + MOST_EXTENSIONS else None
                if rate is not None:
                    needed.append(run(learning_rate=rate, seed=args.choice_seed, for_verdict=False))
                    continue
                best = min(by_rate, key=by_rate.__getitem__)
            else:
                best = choice[0].learning_rate
            verdicts = [run(learning_rate=best, seed=seed, for_verdict=True) for seed in range(args.seeds)]
            needed += [verdict for verdict in verdicts if verdict not in results]
    return needed


def expected_runs(args: argparse.Namespace) -> int:
    """Number of runs, if no set of learning rates must grow."""
    choices = (len(method.learning_rates) for method in args.methods.values())
    return len(args.tasks) * sum(args.seeds + (count if count > 1 else 0) for count in choices)


def run_all(runs: Iterable[Run], args: argparse.Namespace) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Results of runs as they come, from `--jobs` processes."""
    work = partial(measured, folders=args.folders, fresh=args.fresh)
    if args.jobs == 1:
        quiet(threads=1)
        yield from map(work, runs)
        return
    with multiprocessing.get_context("spawn").Pool(args.jobs, quiet, (1,)) as pool:
        yield from pool.imap_unordered(work, runs)


def measured(run: Run, folders: Folders, fresh: bool) -> tuple[Run, dict[str, Any]]:
    return run, measure(run, folders, fresh)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="holds models/ and data/")
    parser.add_argument("--output", type=Path, default=Path("runs/real_posterior"), help="results, table and figure")
    parser.add_argument("--task", dest="tasks", action="append", choices=list(TASKS), help="repeat; default: all")
    parser.add_argument("--method", dest="methods", action="append", help="repeat for several; default: all")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="instead of each method's own set")
    parser.add_argument("--seeds", type=int, default=3, help="of the verdict")
    parser.add_argument("--choice-seed", type=int, default=FIRST_CHOICE_SEED, help="of the runs that choose the rate")
    parser.add_argument("--samples", type=int, default=Sizes.samples, help="completions to train on")
    parser.add_argument("--prior-draws", type=int, default=Sizes.prior, help="draws of the prior a prompt, for log Z")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--fresh", action="store_true", help="train anew, whatever the output folder holds")
    parser.add_argument("--plan", action="store_true", help="print how many runs are needed, and stop")
    args = parser.parse_args(arguments)
    args.tasks = args.tasks or list(TASKS)
    try:
        args.methods = dict(map(method_of, args.methods or METHODS))
        check_samples(args.samples)
    except ValueError as error:
        parser.error(str(error))
    if args.learning_rates:
        rates = tuple(sorted(args.learning_rates))
        args.methods = {name: replace(method, learning_rates=rates) for name, method in args.methods.items()}
    if args.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {args.seeds}")
    if args.choice_seed < args.seeds:
        parser.error(f"--choice-seed must be another than those of the verdict, 0 to {args.seeds - 1}")
    if not (args.shared / "models").is_dir():
        parser.error(f"--shared must be a folder with models/ and data/, got {args.shared}, which has no models/")
    args.folders = Folders(args.shared.resolve(), args.output.resolve())
    args.sizes = Sizes(samples=args.samples, prior=args.prior_draws)
    return args


def method_of(text: str) -> tuple[str, Method]:
    """Name and record of a method that a flag names."""
    if text in METHODS:
        return text, METHODS[text]
    trainer, _, options = text.partition(":")
    try:
        return text, Method(trainer, json.loads(options or "{}"))
    except (json.JSONDecodeError, ValueError) as error:
        raise ValueError(f"--method must be one of {list(METHODS)}, or trainer:JSON, got {text!r}: {error}") from error


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 170)
    if args.plan:
        console.print(f"{expected_runs(args)} runs, and more where a set of learning rates must grow.")
        return
    quiet(threads=1)
    args.folders.output.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    results: Results = {}
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, speed_estimate_period=3600) as progress:
        targets = {}
        for task in args.tasks:
            bar = progress.add_task(f"draws of the prior, {task}", total=None)
            targets[task] = Target.of(task, args.folders, args.sizes.prior, partial(progress.advance, bar))
            progress.remove_task(bar)
        bar = progress.add_task("runs", total=expected_runs(args))
        while needed := still_needed(args, results):
            for run, result in run_all(needed, args):
                results[run] = result
                found = sum(result["distances"]["gap"]) / len(result["distances"]["gap"])
                total = max(expected_runs(args), len(results))
                progress.update(bar, completed=len(results), total=total)
                progress.console.print(
                    f"{len(results)}/{total} {run.task}, {run.name}, learning rate {run.learning_rate:g}, seed "
                    f"{run.seed}: {found:.4f} nats, {sum(result['seconds'].values()):.0f} s",
                    highlight=False,
                )
    write_report(results, targets, args.folders.output, console)


if __name__ == "__main__":
    main()
