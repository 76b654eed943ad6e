"""
Rare constraints and large learning rates: does GDCTrainer ever end further from the posterior than it began?

    python benchmarks/gdc_robustness.py                                      some hours on one core
    python benchmarks/gdc_robustness.py --quick                              a smoke run of every method
    python benchmarks/gdc_robustness.py --method '{"divergence": "js"}' --method '{}' --z 0.02 0.002 --seeds 2

The toy is that of `exact_posterior.py`, with its three prompts. A constraint is "at least k of the words S", chosen so
that the share Z of the prior's completions that meet it is about the one asked for. The distance of the prior is
KL(p‖π0) = −log Z. KL(π‖p) is infinite until the last forbidden completion has no mass, so KL(p‖π) is measured:

- exactly, by enumeration; a run is worse where it ends above −log Z;
- and from exact draws of the posterior, the draws of the prior that meet the constraint (rejection), as one would do
  with a model that cannot be enumerated: the mean of log π0 − log Ẑ − log π, with Ẑ the share of accepted draws.

A method is any fields of GDCConfig as JSON. `--learning-rate` is the one of factor 1, which `exact_posterior.py` finds
best. Every method draws the same number of completions in batches of 64, with Adam and linear decay.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import Dataset
from equal_samples import BATCH, MAX_GRAD_NORM
from exact_posterior import Target
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from rlhf_bayes import GDCConfig, GDCTrainer, LanguageModel
from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.likelihoods import Constraint
from rlhf_bayes.numerics import forward_kl
from rlhf_bayes.numerics.f_divergence import divergence_cases, divergence_of

METHODS = (
    "{}",
    '{"ess_min": 0}',
    '{"ess_min": 8}',
    *(
        json.dumps({"divergence": name} | ({} if alpha is None else {"alpha": alpha}))
        for name, alpha in divergence_cases()
        if name != GDCConfig.divergence and not divergence_of(name, alpha).infinite_where_forbidden
    ),
    '{"num_iterations": 4, "replay_batches": 8}',
    '{"divergence": "log_variance", "num_iterations": 4, "replay_batches": 8}',
    '{"proposal": "adaptive"}',
    '{"proposal": "prior"}',
)
WANTED = 0.9  # satisfaction
DRAWS = 100  # exact draws for each prompt


@dataclass(frozen=True)
class AtLeast:
    """The constraint that a completion holds at least `count` tokens of a set."""

    tokens: tuple[int, ...]
    count: int

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[bool]:
        return [sum(token in self.tokens for token in ids) >= self.count for ids in completion_ids]


class Problem:
    """A constraint on the toy that about the wanted share of the prior meets, and its posterior."""

    def __init__(self, wanted: float):
        self.target = Target((0, 1, 2))
        toy = self.toy = self.target.toy
        eos = toy.tokenizer.eos_token_id
        held = torch.tensor(
            [[ids.count(token) for token in range(toy.vocab_size)] for ids in toy.completion_ids]
        )  # (N, V)
        words = [token for token in range(toy.vocab_size) if token not in (eos, toy.tokenizer.pad_token_id)]
        candidates = [
            AtLeast(tokens, count)
            for size in range(1, len(words) + 1)
            for tokens in itertools.combinations(words, size)
            for count in range(1, toy.max_completion_length + 1)
        ]
        self.constraint = min(candidates, key=lambda c: self._distance(c, held, math.log(wanted)))
        self.allowed = self._allowed(self.constraint, held)  # (N,)
        log_density = self.target.log_prior.masked_fill(~self.allowed, -torch.inf)  # (P, N)
        self.log_z = log_density.logsumexp(-1)  # (P,)
        self.log_posterior = log_density - self.log_z[:, None]

    def _allowed(self, constraint: AtLeast, held: Tensor) -> Tensor:
        return held[:, list(constraint.tokens)].sum(-1) >= constraint.count

    def _distance(self, constraint: AtLeast, held: Tensor, wanted: float) -> float:
        masses = self.target.log_prior.exp() @ self._allowed(constraint, held).float()  # (P,)
        return (masses.log() - wanted).abs().max().item()

    def language_model(self, model: torch.nn.Module) -> LanguageModel:
        toy = self.toy
        return LanguageModel(model, toy.tokenizer, max_completion_length=toy.max_completion_length, batch_size=4096)

    def exact_draws(self, seed: int) -> list["Draws"]:
        """Exact draws of the posterior for each prompt, by rejection from the prior."""
        prior, generator = self.language_model(self.target.new_model()), torch.Generator().manual_seed(seed)
        result = []
        for prompt in self.target.prompts:
            ids: list[list[int]] = []
            log_prior: list[float] = []
            drawn = 0
            while len(ids) < DRAWS:
                sample = prior.sample([prompt], n=4096, generator=generator)
                kept = [i for i, allowed in enumerate(self.constraint(sample.completion_ids)) if allowed]
                drawn += len(sample)
                ids += [sample.completion_ids[i] for i in kept]
                log_prior += sample.log_prob[kept].tolist()
            result.append(Draws(prompt, ids, torch.tensor(log_prior), drawn))
        return result


@dataclass
class Draws:
    """Exact draws of the posterior of a prompt, and how many draws of the prior were needed."""

    prompt: str
    ids: list[list[int]]
    log_prior: Tensor  # (n,)
    drawn: int

    def forward_kl(self, policy: LanguageModel) -> tuple[float, float]:
        """KL(p‖π) and its squared standard error, from the variance over draws and that of log Ẑ."""
        n = len(self.ids)
        log_policy = policy.log_prob([self.prompt] * n, self.ids)
        terms = self.log_prior - math.log(n / self.drawn) - log_policy  # (n,)
        return terms.mean().item(), terms.var().item() / n + (1 - n / self.drawn) / n


@dataclass(frozen=True)
class Cell:
    """One training run."""

    method: str
    z: float
    factor: float
    seed: int


@dataclass
class Run:
    """Exact KL(p‖π) and satisfaction, means over prompts, at points of the training."""

    samples: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    satisfaction: list[float] = field(default_factory=list)
    by_rejection: float = math.nan
    standard_error: float = math.nan
    skipped: float = 0.0

    @property
    def worse(self) -> bool:
        return not self.kl[-1] <= self.kl[0]

    @property
    def samples_until_satisfied(self) -> int | None:
        """Completions until satisfaction reaches `WANTED` and does not fall below it again."""
        below = [i for i, share in enumerate(self.satisfaction) if not share >= WANTED]
        return self.samples[below[-1] + 1] if below[-1] + 1 < len(self.samples) else None

    def add(self, samples: int, problem: Problem, model: torch.nn.Module) -> None:
        with torch.no_grad():
            log_probs = problem.toy.log_probs(model, problem.target.prompts)  # (P, N)
        self.samples.append(samples)
        self.kl.append(forward_kl(problem.log_posterior, log_probs).mean().item())
        self.satisfaction.append((log_probs.exp() @ problem.allowed.float()).mean().item())


class RunCallback(TrainerCallback):
    """Adds a point at regular rollouts, and counts skipped steps."""

    def __init__(self, run: Run, problem: Problem, steps_per_rollout: int, every: int):
        self.run, self.problem, self.steps_per_rollout = run, problem, steps_per_rollout
        self.every = every * steps_per_rollout

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.run.add(state.global_step // self.steps_per_rollout * BATCH, self.problem, model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.run.skipped = (logs or {}).get("gdc/skipped_steps", self.run.skipped)


def run_cell(cell: Cell, problem: Problem, draws: list[Draws], args: argparse.Namespace) -> Run:
    """Train once, and measure during training."""
    run, toy = Run(), problem.toy
    model = problem.target.new_model()
    run.add(0, problem, model)
    overrides = {"num_iterations": 1, "num_generations": 8} | json.loads(cell.method)
    rollouts = args.samples // BATCH
    steps_per_rollout = overrides["num_iterations"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GDCTrainer(
            model=model,
            likelihood=Constraint(problem.constraint),
            args=GDCConfig(
                output_dir=folder,
                seed=cell.seed,
                learning_rate=args.learning_rate * cell.factor,
                max_grad_norm=MAX_GRAD_NORM,
                per_device_train_batch_size=BATCH,
                steps_per_generation=1,
                max_completion_length=toy.max_completion_length,
                max_steps=rollouts * steps_per_rollout,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=rollouts * steps_per_rollout,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **overrides,
            ),
            train_dataset=Dataset.from_dict({"prompt": problem.target.prompts * BATCH}),
            processing_class=toy.tokenizer,
            callbacks=[RunCallback(run, problem, steps_per_rollout, every=max(1, rollouts // 50))],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    policy = problem.language_model(trainer.model)
    estimates = [draw.forward_kl(policy) for draw in draws]
    run.by_rejection = statistics.fmean(kl for kl, _ in estimates)
    run.standard_error = math.sqrt(sum(variance for _, variance in estimates)) / len(estimates)
    return run


def results_table(results: dict[Cell, Run]) -> Table:
    """A row for each method, constraint and learning rate; medians over seeds."""
    table = Table(title="Rare constraints, medians over seeds; KL(p‖π) in nats")
    columns = (
        "method",
        "Z",
        "rate ×",
        "worse",
        "KL before",
        "KL after",
        "by rejection",
        "worst",
        "satisfied",
        "to 90 %",
    )
    for name in (*columns, "skipped"):
        table.add_column(name, justify="left" if name == "method" else "right")
    groups: dict[tuple[str, float, float], list[Run]] = {}
    for cell, run in results.items():
        groups.setdefault((cell.method, cell.z, cell.factor), []).append(run)
    for (method, z, factor), runs in groups.items():
        until = sorted(run.samples_until_satisfied or math.inf for run in runs)[(len(runs) - 1) // 2]
        median_run = sorted(runs, key=lambda run: run.kl[-1])[(len(runs) - 1) // 2]
        worse = sum(run.worse for run in runs)
        table.add_row(
            method,
            f"{z:g}",
            f"{factor:g}",
            f"[{'red' if worse else 'green'}]{worse}/{len(runs)}[/]",
            f"{runs[0].kl[0]:.2f}",
            f"[bold]{median_run.kl[-1]:.3f}[/]",
            f"{median_run.by_rejection:.3f} ± {median_run.standard_error:.3f}",
            f"{max(max(run.kl) for run in runs):.2f}",
            f"{statistics.median(run.satisfaction[-1] for run in runs):.1%}",
            "never" if until == math.inf else f"{until:,}",
            f"{statistics.fmean(run.skipped for run in runs):.0%}",
        )
    return table


def worse_table(results: dict[Cell, Run], factors: list[float]) -> Table:
    """How often each method ends worse than it began, over all constraints and seeds."""
    table = Table(title="Runs that end further from the posterior than they began")
    for name in ("method", *(f"learning rate × {factor:g}" for factor in factors)):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in dict.fromkeys(cell.method for cell in results):
        cells = []
        for factor in factors:
            runs = [run for cell, run in results.items() if (cell.method, cell.factor) == (method, factor)]
            cells.append(f"{sum(run.worse for run in runs)}/{len(runs)}")
        table.add_row(method, *cells)
    return table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", dest="methods", action="append", help="JSON; repeat for several; default: a table")
    parser.add_argument("--z", type=float, nargs="+", default=[0.5, 0.1, 0.02, 0.005, 0.002])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 3.0, 10.0], help="of the learning rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=6400, help=f"completions, a multiple of {BATCH}")
    parser.add_argument("--json", type=Path, help="also write every run to this file")
    parser.add_argument("--quick", action="store_true", help="one constraint, learning rate and seed, 256 completions")
    args = parser.parse_args(arguments)
    args.methods = args.methods or list(METHODS)
    if args.samples <= 0 or args.samples % BATCH:
        parser.error(f"--samples must be a multiple of {BATCH}, got {args.samples}")
    if not all(0 < z < WANTED for z in args.z):
        parser.error(f"--z must be between 0 and {WANTED}, got {args.z}")
    if args.quick:
        args.z, args.factors, args.seeds, args.samples = args.z[:1], args.factors[:1], 1, 4 * BATCH
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    quiet(threads=1)
    console = Console(width=None if sys.stdout.isatty() else 190)
    results: dict[Cell, Run] = {}
    for z in args.z:
        problem = Problem(z)
        words = problem.toy.tokenizer.convert_ids_to_tokens(list(problem.constraint.tokens))
        shares = " ".join(f"{share:.4f}" for share in problem.log_z.exp())
        console.print(f"At least {problem.constraint.count} of {words}: Z {shares}", highlight=False)
        draws = problem.exact_draws(seed=0)
        for method, factor, seed in itertools.product(args.methods, args.factors, range(args.seeds)):
            run = results[Cell(method, z, factor, seed)] = run_cell(
                Cell(method, z, factor, seed), problem, draws, args
            )
            console.print(
                f"{method}, Z {z:g}, × {factor:g}, seed {seed}: KL {run.kl[0]:.3f} to {run.kl[-1]:.3f}, "
                f"satisfied {run.satisfaction[-1]:.1%}",
                highlight=False,
            )
        if args.json is not None:
            rows = [asdict(cell) | asdict(run) for cell, run in results.items()]
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(results_table(results))
    console.print(worse_table(results, args.factors))


if __name__ == "__main__":
    main()
