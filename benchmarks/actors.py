"""
Actors and a learner apart, beside one process that draws and learns: speed, and distance reached by staleness.

    python benchmarks/actors.py speed
    python benchmarks/actors.py distance

`speed` trains the bundled model on its sentiment reward by the log-variance loss: first in one process, then with an
actor in a process of its own, one thread each. Wall clock, and CPU seconds, which other programs disturb less.

`distance` trains the enumerable toy (4,681 completions a prompt): exact KL(π‖π*) after as many completions, with
actors that are a fixed number of optimizer steps behind. They draw in the same process here, so that the number is
exact.
"""

import argparse
import math
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback

from rlhf_bayes import GDCConfig, GDCTrainer, LanguageModel, toy
from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.store import Actor, CompletionStore
from rlhf_bayes.testing import EnumerableLM, toy_reward
from rlhf_bayes.toy.rewards import sentiment_reward

BATCH = 64
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "divergence": "log_variance",
    "per_device_train_batch_size": BATCH,
}


def logged(trainer: GDCTrainer, name: str) -> list[float]:
    """The values of a metric over a training."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# speed


def bundled_actor(folder: str) -> Actor:
    """An actor of the bundled model, on its prompts and its reward."""
    prior = LanguageModel(toy.model_path(), max_completion_length=32)
    likelihood = prior.tilt(sentiment_reward, beta=1.0).likelihood
    return Actor(f"{folder}/store", f"{folder}/weights", prior, likelihood, toy.prompts())


def act(folder: str) -> None:
    """The process of an actor, which leaves the CPU seconds of a completion in the folder."""
    quiet(threads=1)
    actor = bundled_actor(folder)
    start = time.process_time()
    actor.run()
    Path(f"{folder}/cpu").write_text(str((time.process_time() - start) / max(actor.num_drawn, 1)))


def speed_of(num_actors: int, steps: int, max_staleness: int) -> dict[str, float]:
    """Seconds, CPU seconds and metrics of a training of the bundled model; without actors it draws itself."""
    children = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"output_dir": folder, "beta": 0.25, "max_steps": steps, "learning_rate": 1e-4}
        options |= {"num_generations": 8, "max_completion_length": 32, "logging_steps": 1, **QUIET}
        actors = [children.Process(target=act, args=(folder,), daemon=True) for _ in range(num_actors)]
        if actors:
            bundled_actor(folder)  # makes the store
            args = GDCConfig(actor_weights=f"{folder}/weights", max_staleness=max_staleness, **options)
            data: Any = CompletionStore(f"{folder}/store")
        else:
            args, data = GDCConfig(**options), Dataset.from_dict({"prompt": toy.prompts()})
        trainer = GDCTrainer(toy.model_path(), None if actors else sentiment_reward, args, data)
        trainer.remove_callback(PrinterCallback)
        clock = Clock(after=5)  # the start of an actor takes longer than a step
        trainer.add_callback(clock)
        for process in actors:
            process.start()
        trainer.train()
        for process in actors:
            process.join()
        found = {"seconds": clock.seconds, "cpu": clock.cpu, "samples": BATCH * (steps - clock.after)}
        found["actor"] = BATCH * float(Path(f"{folder}/cpu").read_text()) if actors else math.nan
        for name in ("waiting", "staleness", "ess", "dropped"):
            found[name] = mean(logged(trainer, f"actors/{name}")[clock.after :] or [math.nan])
    return found


class Clock(TrainerCallback):
    """Wall clock and CPU seconds of the steps after the first ones."""

    def __init__(self, after: int):
        self.after, self.seconds, self.cpu = after, 0.0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            self._start = time.perf_counter(), time.process_time()
        elif state.global_step > self.after:
            self.seconds, self.cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def speed(steps: int, repeats: int, max_staleness: int) -> Table:
    """A row for one process, and for one with an actor."""
    table = Table(title=f"{BATCH} completions of up to 32 tokens a step; {repeats} runs of {steps} steps")
    for column in ("", "samples/s", "CPU s a step", "of the actor", "waiting", "staleness", "ESS", "dropped"):
        table.add_column(column)
    for name, num_actors in (("one process", 0), ("a learner and an actor", 1)):
        runs = [speed_of(num_actors, steps, max_staleness) for _ in range(repeats)]
        rates = " ".join(f"{run['samples'] / run['seconds']:.1f}" for run in runs)
        cpu = f"{mean(run['cpu'] / run['samples'] * BATCH for run in runs):.2f}"
        keys = ("actor", "waiting", "staleness", "ess", "dropped")
        cells = [f"{mean(run[key] for run in runs):.2f}" for key in keys]
        table.add_row(name, rates, cpu, *("–" if cell == "nan" else cell for cell in cells))
        Console(stderr=True).print(name, rates, cpu, *cells)
    return table


# distance


class Behind(TrainerCallback):
    """Lets an actor draw before each push of weights, as far ahead as it may."""

    def __init__(self, actor: Actor):
        self.actor = actor

    def on_step_end(self, args, state, control, **kwargs):
        while self.actor.draw_once():
            pass


class FirstDraws(TrainerCallback):
    """Lets an actor draw what the learner needs to begin, once the first weights are pushed."""

    def __init__(self, actor: Actor):
        self.actor = actor

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            while self.actor.draw_once():
                pass


def trained_distance(lm: EnumerableLM, behind: int | None, samples: int, seed: int) -> tuple[float, float, float]:
    """Exact KL(π‖π*), nats, the mean over prompts; mean staleness and ESS. `behind` None: the policy's own draws."""
    policy, group, beta = lm.random_policy(noise=0.0), 16, 0.5
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"output_dir": folder, "beta": beta, "seed": seed, "learning_rate": 2e-3}
        options |= {"num_generations": group, "max_completion_length": lm.max_completion_length, "logging_steps": 1}
        options |= {"max_steps": samples // BATCH, "max_grad_norm": 1.0, **QUIET}
        if behind is None:
            data: Any = Dataset.from_dict({"prompt": lm.prompts * 4})
            trainer = GDCTrainer(policy, toy_reward, GDCConfig(**options), data, processing_class=lm.tokenizer)
        else:
            prior = LanguageModel(lm.random_policy(noise=0.0), lm.tokenizer, lm.max_completion_length)
            likelihood = prior.tilt(toy_reward, beta=1.0).likelihood
            actor = Actor(f"{folder}/store", f"{folder}/weights", prior, likelihood, lm.prompts, seed=seed)
            args = GDCConfig(actor_weights=f"{folder}/weights", max_staleness=behind + 1, **options)
            arguments: Any = {"processing_class": lm.tokenizer, "callbacks": [Behind(actor)]}
            trainer = GDCTrainer(policy, None, args, CompletionStore(f"{folder}/store"), **arguments)
            trainer.add_callback(FirstDraws(actor))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        staleness, ess = (mean(logged(trainer, f"actors/{name}") or [0.0]) for name in ("staleness", "ess"))
    with torch.no_grad():
        return lm.reverse_kl(policy, lm.rewards / beta).mean().item(), staleness, ess


def distance(samples: int, seeds: int, steps_behind: list[int]) -> Table:
    """A row for the policy's own draws, and for each number of steps that actors are behind."""
    lm = EnumerableLM()
    before = lm.reverse_kl(lm.model, lm.rewards / 0.5).mean().item()
    table = Table(title=f"KL(π‖π*), nats (prior {before:.2f}), after {samples:,} completions; {seeds} seeds")
    for column in ("drawn by", "each seed", "mean", "standard error", "mean staleness", "ESS of π/q"):
        table.add_column(column)
    for behind in (None, *steps_behind):
        found = [trained_distance(lm, behind, samples, seed) for seed in range(seeds)]
        values = [kl for kl, _, _ in found]
        error = stdev(values) / math.sqrt(seeds) if seeds > 1 else math.nan
        name = "the policy, in one process" if behind is None else f"actors {behind} steps behind"
        ess = "–" if behind is None else f"{mean(row[2] for row in found):.2f}"
        each = " ".join(f"{kl:.3f}" for kl in values)
        cells = [f"{mean(values):.3f}", f"{error:.3f}", f"{mean(row[1] for row in found):.1f}", ess]
        table.add_row(name, each, *cells)
        Console(stderr=True).print(name, each, *cells)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Actors and a learner apart, beside one process that does both.")
    parser.add_argument("what", choices=["speed", "distance"])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a measurement of speed")
    parser.add_argument("--repeats", type=int, default=2, help="measurements of speed")
    parser.add_argument("--max_staleness", type=int, default=8, help="for speed")
    parser.add_argument("--samples", type=int, default=6400, help="completions of a training, for distance")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--behind", type=int, nargs="+", default=[1, 4, 16, 64], help="optimizer steps")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the actors
    quiet(threads=1)
    if arguments.what == "speed":
        Console().print(speed(arguments.steps, arguments.repeats, arguments.max_staleness))
    else:
        Console().print(distance(arguments.samples, arguments.seeds, arguments.behind))
