"""
How close training from stored draws of the prior comes to the posterior, beside as many on-line draws.

    python benchmarks/stored_distances.py                                    the enumerable toy
    python benchmarks/stored_distances.py --task stories --shared ../shared  stories260K with VADER's reward
    python benchmarks/stored_distances.py --loss js --samples 6400 --seeds 1

A cell is a loss, a number of completions, a number of updates with each of them, and how far the draws lag behind the
policy: `store` reads draws of the prior, made before the training; `1` draws on-line, for one optimizer step at a
time; `16` draws on-line for 16 steps at once, so that a completion is up to 15 steps old when it is learnt from.

Batches of 64 with Adam and linear decay. The learning rate of a cell is the best of a few for a seed of its own, and
the table shows other seeds. On the toy, KL(π‖π*) and KL(π*‖π) are exact, and ± is one standard error over seeds; on
stories260K they come from fresh draws (`posterior_distances.py`), and ± is clustered by prompt and includes the seeds.
Each result is a file in `--output`, so an interrupted run goes on where it was.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import Dataset
from equal_samples import BATCH, MAX_GRAD_NORM
from posterior_distances import distances, prompt_token_ids
from real_posterior_worker import Sizes, Target, cached
from real_report import Number, averaged
from real_tasks import TASKS, Folders
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PrinterCallback

from rlhf_bayes import GDCConfig, GDCTrainer, LanguageModel
from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.store import CompletionStore, provenance_of, scored_completions
from rlhf_bayes.testing import EnumerableLM, toy_reward

LOSSES = ("log_variance", "js", "forward_kl")
STORE = "store"
CHOICE_SEED = 1000  # of the runs that choose the learning rate


@dataclass(frozen=True)
class Cell:
    """A row's settings, before the learning rate and the seed."""

    task: str
    loss: str
    samples: int
    updates: int
    """With each completion."""
    lag: str
    """`store`, or the number of optimizer steps whose completions are drawn at once."""


class Problem(Protocol):
    """A posterior, a policy to start from, and the exact or estimated distance of a trained one."""

    rates: tuple[float, ...]
    group: int
    beta: float
    length: int
    prompts: list[str]
    tokenizer: Any
    reward: Any

    def policy(self) -> nn.Module: ...

    def distance(self, policy: nn.Module, seed: int) -> dict[str, list[float]]:
        """KL(π‖π*) and KL(π*‖π) of each prompt, nats, by the names `reverse` and `forward`."""
        ...


class Toy:
    """4,681 completions of each of three prompts, whose posteriors one model fits at once."""

    rates = (5e-4, 1e-3, 2e-3, 5e-3)
    group, beta, reward = 16, 0.5, staticmethod(toy_reward)

    def __init__(self, lm: EnumerableLM):
        self.lm, self.prompts, self.tokenizer = lm, lm.prompts, lm.tokenizer
        self.length = lm.max_completion_length

    def policy(self) -> nn.Module:
        return self.lm.random_policy(noise=0.0)

    @torch.no_grad()
    def distance(self, policy: nn.Module, seed: int) -> dict[str, list[float]]:
        evidence = self.lm.rewards / self.beta
        reverse, forward = self.lm.reverse_kl(policy, evidence), self.lm.forward_kl(policy, evidence)
        return {"reverse": reverse.tolist(), "forward": forward.tolist()}


class Stories:
    """stories260K as prior, 32 prompts, VADER's score of the completion as reward."""

    rates = (2e-5, 5e-5, 1e-4)

    def __init__(self, folders: Folders, sizes: Sizes):
        self.target, self.sizes = Target.of("stories", folders, sizes.prior), sizes
        self.task = self.target.task
        self.group, self.beta, self.reward = self.task.num_generations, self.task.beta, self.task.reward
        self.length, self.prompts = self.task.length, self.task.prompts
        self.tokenizer = self.task.load_tokenizer()

    def policy(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.task.model, dtype=torch.float32)

    def distance(self, policy: nn.Module, seed: int) -> dict[str, list[float]]:
        with tempfile.TemporaryDirectory() as folder:
            policy.save_pretrained(folder)
            fast = cached(self.task, Path(folder))
        fast.check(prompt_token_ids(self.task)[0])
        sizes = {"n": self.sizes.verdict, "forward_draws": self.sizes.forward}
        found = distances(fast, self.target.prior, self.task, self.target.draws, seed=10_000 + seed, **sizes)
        return {"reverse": found.gap, "forward": found.forward_kl or []}


def problem_of(name: str, args: argparse.Namespace) -> Problem:
    if name == "toy":
        return Toy(EnumerableLM())
    return Stories(Folders(args.shared.resolve(), args.output.resolve()), Sizes(prior=args.prior_draws))


def store_of(problem: Problem, folder: Path, samples: int, seed: int) -> CompletionStore:
    """Draws of the prior, as many whole groups of each prompt; those that are there already, if there are any."""
    prior = LanguageModel(problem.policy(), problem.tokenizer, problem.length)
    likelihood = prior.tilt(problem.reward, beta=problem.beta).likelihood
    store = CompletionStore.create(folder, provenance_of(prior, likelihood))
    if len(store) == 0:
        count = problem.group * math.ceil(samples / len(problem.prompts) / problem.group)
        drawn = prior.sample(problem.prompts, count, torch.Generator().manual_seed(30_000 + seed))
        store.append(scored_completions(drawn, prior, likelihood))
    return store


def trained(problem: Problem, cell: Cell, rate: float, seed: int, folder: Path) -> nn.Module:
    """The policy after a training of a cell."""
    from_store = cell.lag == STORE
    at_once = 1 if from_store else int(cell.lag)
    # a rollout needs as many rows as it has groups
    data: Any = Dataset.from_dict({"prompt": problem.prompts * math.ceil(BATCH * at_once / problem.group)})
    if from_store:
        data = store_of(problem, folder / f"store_{cell.task}_{cell.samples}_{seed}", cell.samples, seed)
    with tempfile.TemporaryDirectory() as output:
        args = GDCConfig(
            output_dir=output,
            beta=problem.beta,
            divergence=cell.loss,
            seed=seed,
            learning_rate=rate,
            per_device_train_batch_size=BATCH,
            num_generations=problem.group,
            steps_per_generation=at_once,
            num_iterations=1 if from_store else cell.updates,
            max_completion_length=problem.length,
            max_steps=cell.samples // BATCH * cell.updates,
            max_grad_norm=MAX_GRAD_NORM,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GDCTrainer(
            problem.policy(), None if from_store else problem.reward, args, data, processing_class=problem.tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model


def measured(problem: Problem, cell: Cell, rate: float, seed: int, folder: Path) -> dict[str, list[float]]:
    """The result of one training: from its file, or by training."""
    settings = json.dumps(asdict(cell) | {"rate": rate, "seed": seed}, sort_keys=True)
    name = f"{cell.task}_{cell.loss}_{cell.samples}_{cell.updates}_{cell.lag}_{rate:g}_{seed}"
    path = folder / f"{name}_{hashlib.sha256(settings.encode()).hexdigest()[:6]}.json"
    if not path.exists():
        found = problem.distance(trained(problem, cell, rate, seed, folder), seed)
        path.write_text(json.dumps(found) + "\n")
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Result:
    """A cell at its learning rate: means over prompts and seeds, nats."""

    cell: Cell
    rate: float
    reverse: Number
    forward: Number


def result_of(problem: Problem, cell: Cell, rates: tuple[float, ...], seeds: int, folder: Path) -> Result:
    """The verdict on a cell: the best learning rate for one seed, measured with others."""
    run = functools.partial(measured, problem, cell, folder=folder)
    by_rate = {} if len(rates) == 1 else {rate: run(rate=rate, seed=CHOICE_SEED)["reverse"] for rate in rates}
    rate = min(by_rate, key=lambda rate: sum(by_rate[rate])) if by_rate else rates[0]
    found = [run(rate=rate, seed=seed) for seed in range(seeds)]
    return Result(cell, rate, *(_number(cell, [one[name] for one in found]) for name in ("reverse", "forward")))


def _number(cell: Cell, by_seed: list[list[float]]) -> Number:
    values = torch.tensor(by_seed, dtype=torch.float64)  # (seeds, prompts)
    if cell.task != "toy":
        return averaged(values)
    means = values.mean(-1)  # exact for each seed
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Number(means.mean().item(), error)


def cells_of(args: argparse.Namespace) -> Iterator[Cell]:
    for samples in args.samples:
        for updates in args.updates:
            for lag in args.lags:
                if lag == STORE or updates == 1 or lag == "1":
                    yield from (Cell(args.task, loss, samples, updates, lag) for loss in args.losses)


def table_of(results: list[Result], title: str) -> Table:
    table = Table(title=title)
    for column in ("loss", "completions", "updates", "lag", "learning rate", "KL(π‖π*)", "KL(π*‖π)"):
        table.add_column(column)
    for result in results:
        cell = result.cell
        settings = (cell.loss, f"{cell.samples:,}", str(cell.updates), cell.lag, f"{result.rate:g}")
        table.add_row(*settings, str(result.reverse), str(result.forward))
    return table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["toy", "stories"], default="toy")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="holds models/ and data/, for stories")
    parser.add_argument("--output", type=Path, default=Path("runs/stored_distances"), help="stores and results")
    parser.add_argument("--loss", dest="losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--samples", type=int, nargs="+", default=[6400, 25600], help="completions to learn from")
    parser.add_argument("--updates", type=int, nargs="+", default=[1], help="with each completion")
    parser.add_argument("--lag", dest="lags", nargs="+", default=[STORE, "1"], help="'store', or a number of steps")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="default: those of the task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prior-draws", type=int, default=Sizes.prior, help="a prompt of stories, for log Z")
    args = parser.parse_args(arguments)
    if any(samples <= 0 or samples % BATCH for samples in args.samples):
        parser.error(f"--samples must be positive multiples of {BATCH}, got {args.samples}")
    wrong = [lag for lag in args.lags if lag != STORE and not (lag.isdigit() and int(lag) > 0)]
    if wrong:
        parser.error(f"--lag must be 'store' or a number of optimizer steps, got {wrong[0]!r}")
    if args.task in TASKS and not (args.shared / "models").is_dir():
        parser.error(f"--shared must be a folder with models/ and data/, got {args.shared}, which has no models/")
    return args


def main(arguments: list[str] | None = None) -> None:
    args, console = parse_args(arguments), Console(width=120)
    quiet(threads=1)
    args.output.mkdir(parents=True, exist_ok=True)
    problem = problem_of(args.task, args)
    before = problem.distance(problem.policy(), seed=CHOICE_SEED)
    kls = {name: sum(values) / len(values) for name, values in before.items()}
    title = f"{args.task}: nats; the prior has {kls['reverse']:.3f} and {kls['forward']:.3f}; {args.seeds} seeds"
    results = []
    for cell in cells_of(args):
        rates = tuple(args.learning_rates or problem.rates)
        results.append(result_of(problem, cell, rates, args.seeds, args.output))
        console.print(f"{cell.loss}, {cell.samples:,}, updates {cell.updates}, lag {cell.lag}: {results[-1].reverse}")
    console.print(table_of(results, title))


if __name__ == "__main__":
    main()
