"""
How close trainers come to the posterior: exact divergences by enumeration, at equal samples, on a toy LM.

    python benchmarks/exact_posterior.py                                     about an hour on one core
    python benchmarks/exact_posterior.py --quick                             a smoke run of every method
    python benchmarks/exact_posterior.py --samples 25600 --plot limit.png    closer to the limit
    python benchmarks/exact_posterior.py --method 'ppo:{"num_iterations": 4, "lam": 1.0}' --method rloo --seeds 3
    python benchmarks/exact_posterior.py --method 'gdc:{"divergence": "log_variance", "replay_batches": 8}'

The toy is that of `rlhf_bayes.testing.EnumerableLM`: 4,681 completions of a prompt, β = 0.5 and a reward without
symmetry; its prior here is a GPT-2 of 2 layers × 64, 1.8 nats from the posterior. Every method draws the same number
of completions in batches of 64, with Adam and linear decay; for each, the learning rate with the best median KL(π‖π*)
over seeds is shown, with KL(π*‖π) and the total variation distance beside it. The last row is what exact gradients of
KL(π‖π*) reach in 100 Adam steps. With `--prompts 0 1 2` one model fits three posteriors at once.

A method is `ppo`, `gdc`, `rloo` or `grpo`, with any field of its config as JSON. `steps_per_generation` splits a
batch into that many optimizer steps, and `num_iterations` repeats them.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from equal_samples import BATCH, TRAINERS, make_trainer, steps_per_rollout
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from rlhf_bayes import GDCConfig
from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.numerics import forward_kl, reverse_kl, tv
from rlhf_bayes.numerics.f_divergence import divergence_cases
from rlhf_bayes.testing import EnumerableLM, toy_reward

LINE_STYLES = {"ppo": "-", "gdc": (0, (4, 1, 1, 1)), "rloo": "--", "grpo": "-."}
METHODS = (
    "ppo",
    'ppo:{"critic": "separate"}',
    'ppo:{"num_iterations": 4}',
    'ppo:{"num_iterations": 4, "steps_per_generation": 4}',
    "rloo",
    'rloo:{"num_iterations": 4}',
    'rloo:{"num_iterations": 4, "steps_per_generation": 4}',
    "grpo",
    'grpo:{"scale_rewards": "none"}',
    "gdc",
    'gdc:{"num_iterations": 4}',
    *(
        "gdc:" + json.dumps({"divergence": name} | ({} if alpha is None else {"alpha": alpha}))
        for name, alpha in divergence_cases()
        if name != GDCConfig.divergence
    ),
    'gdc:{"divergence": "alpha", "alpha": 0.5, "num_iterations": 4}',
    'gdc:{"divergence": "log_variance"}',
    'gdc:{"divergence": "log_variance", "num_iterations": 4}',
    'gdc:{"divergence": "log_variance", "num_iterations": 4, "replay_batches": 8}',
    'gdc:{"divergence": "log_variance", "num_iterations": 8, "replay_batches": 16}',
)
EXACT = "exact gradient"
EXACT_STEPS, EXACT_LEARNING_RATES = 100, (5e-4, 1e-3, 2e-3)
POINTS = 20  # number of points of a curve


@dataclass(frozen=True)
class Cell:
    """One training run."""

    method: str
    learning_rate: float
    seed: int
    samples: int
    prompts: tuple[int, ...] = (2,)

    @property
    def overrides(self) -> dict[str, Any]:
        return json.loads(self.method.partition(":")[2] or "{}")


@dataclass
class Curve:
    """Exact divergences, means over prompts, against the number of completions (or of exact gradients)."""

    samples: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    """KL(π‖π*), nats."""
    forward_kl: list[float] = field(default_factory=list)
    """KL(π*‖π), nats."""
    tv: list[float] = field(default_factory=list)
    """Total variation distance."""
    seconds: float = 0.0

    def add(self, samples: int, target: "Target", model: torch.nn.Module) -> None:
        with torch.no_grad():
            log_probs = target.toy.log_probs(model, target.prompts)  # (P, N)
        self.samples.append(samples)
        for column, divergence in ((self.kl, reverse_kl), (self.forward_kl, forward_kl), (self.tv, tv)):
            column.append(divergence(target.log_posterior, log_probs).mean().item())


class Target:
    """The posterior of some of the toy's prompts, and a prior large enough for exact gradients to come close to it."""

    def __init__(self, prompts: tuple[int, ...]):
        self.toy = EnumerableLM("gpt2")
        self.prompts = [self.toy.prompts[index] for index in prompts]
        with torch.no_grad():
            self.log_prior = self.toy.log_probs(self.new_model(), self.prompts)  # (P, N)
        self.log_posterior = (self.log_prior + self.toy.log_likelihood[list(prompts)]).log_softmax(-1)  # (P, N)

    def new_model(self) -> GPT2LMHeadModel:
        """A copy of the prior, to train."""
        token_ids = {"eos_token_id": self.toy.tokenizer.eos_token_id, "pad_token_id": self.toy.tokenizer.pad_token_id}
        config = GPT2Config(
            vocab_size=self.toy.vocab_size,
            n_embd=64,
            n_layer=2,
            n_head=2,
            n_positions=32,
            initializer_range=0.05,
            bos_token_id=None,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **token_ids,
        )
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)

    def kl(self, model: torch.nn.Module) -> torch.Tensor:
        """Exact KL(π‖π*), mean over prompts: (), nats, with gradient."""
        return reverse_kl(self.log_posterior, self.toy.log_probs(model, self.prompts)).mean()


class CurveCallback(TrainerCallback):
    """Adds a point to the curve at regular rollouts, and at the end."""

    def __init__(self, curve: Curve, target: Target, steps_per_rollout: int, rollouts: int):
        self.curve, self.target = curve, target
        self.steps_per_rollout = steps_per_rollout
        self.every = max(1, rollouts // POINTS) * steps_per_rollout

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.curve.add(state.global_step // self.steps_per_rollout * BATCH, self.target, model)


def run_cell(cell: Cell) -> Curve:
    """Train once, and measure during training."""
    started = time.perf_counter()
    target, curve = Target(cell.prompts), Curve()
    curve.add(0, target, target.new_model())
    if cell.method == EXACT:
        descend_exactly(target, curve, cell.learning_rate)
    else:
        train(target, curve, cell)
    curve.seconds = time.perf_counter() - started
    return curve


def run_cells(cells: list[Cell], jobs: int) -> Iterator[Curve]:
    """The curves of cells, run one after another in this process, or in `jobs` processes at once."""
    if jobs == 1:
        quiet(threads=1)
        yield from map(run_cell, cells)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, quiet, (1,)) as pool:
        yield from pool.imap(run_cell, cells)


def descend_exactly(target: Target, curve: Curve, learning_rate: float) -> None:
    model = target.new_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for step in range(EXACT_STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / EXACT_STEPS)
        optimizer.zero_grad()
        target.kl(model).backward()
        optimizer.step()
    curve.add(EXACT_STEPS, target, model)


def train(target: Target, curve: Curve, cell: Cell) -> None:
    toy, options = target.toy, {"num_generations": 4} | cell.overrides
    with tempfile.TemporaryDirectory() as folder:
        target.new_model().save_pretrained(folder)
        make_trainer(
            cell.method.partition(":")[0],
            options,
            model=folder,
            tokenizer=toy.tokenizer,
            reward_func=toy_reward,
            # a batch takes BATCH / num_generations rows, so the dataset needs at least as many
            prompts=target.prompts * BATCH,
            beta=toy.beta,
            max_completion_length=toy.max_completion_length,
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            samples=cell.samples,
            output_dir=folder,
            callbacks=[CurveCallback(curve, target, steps_per_rollout(options), cell.samples // BATCH)],
        ).train()


@dataclass(frozen=True)
class Summary:
    """A method at its best learning rate."""

    method: str
    learning_rate: float
    median: float
    by_learning_rate: dict[float, float]
    curves: list[Curve]

    @property
    def other_ends(self) -> list[list[float]]:
        """KL(π*‖π) and total variation distance of each seed at the end."""
        return [[curve.forward_kl[-1] for curve in self.curves], [curve.tv[-1] for curve in self.curves]]

    @classmethod
    def of(cls, method: str, results: dict[Cell, Curve]) -> "Summary":
        curves: dict[float, list[Curve]] = {}
        for cell, curve in results.items():
            if cell.method == method:
                curves.setdefault(cell.learning_rate, []).append(curve)
        medians = {rate: statistics.median(curve.kl[-1] for curve in runs) for rate, runs in curves.items()}
        best = min(medians, key=medians.__getitem__)
        return cls(method, best, medians[best], medians, curves[best])


def results_table(summaries: list[Summary], samples: int) -> Table:
    table = Table(title=f"Exact divergences after {samples:,} completions, KLs in nats; medians over seeds")
    for name in (
        "method",
        "learning rate",
        "KL(π‖π*)",
        "lowest",
        "highest",
        "KL(π*‖π)",
        "TV",
        "KL(π‖π*) by rate",
        "s",
    ):
        table.add_column(name, justify="left" if name == "method" else "right")
    for summary in summaries:
        ends = [curve.kl[-1] for curve in summary.curves]
        table.add_row(
            f"{EXACT}, {EXACT_STEPS} Adam steps" if summary.method == EXACT else summary.method,
            f"{summary.learning_rate:g}",
            f"[bold]{summary.median:.4f}[/]",
            f"{min(ends):.4f}",
            f"{max(ends):.4f}",
            *(f"{statistics.median(ends):.4f}" for ends in summary.other_ends),
            "  ".join(f"{rate:g}: {kl:.4f}" for rate, kl in summary.by_learning_rate.items()),
            f"{statistics.median(curve.seconds for curve in summary.curves):.1f}",
        )
    return table


def plot(summaries: list[Summary], samples: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 7), layout="constrained")
    for summary in summaries:
        kls = torch.tensor([curve.kl for curve in summary.curves])  # (seeds, points)
        if summary.method == EXACT:
            axes.axhline(summary.median, color="black", linestyle=":", label=f"{EXACT}, {EXACT_STEPS} Adam steps")
            continue
        samples_drawn, style = summary.curves[0].samples, LINE_STYLES[summary.method.partition(":")[0]]
        label = f"{summary.method}, learning rate {summary.learning_rate:g}"
        (line,) = axes.plot(samples_drawn, kls.quantile(0.5, dim=0), linestyle=style, label=label)
        axes.fill_between(
            samples_drawn, kls.min(0).values, kls.max(0).values, alpha=0.15, linewidth=0, color=line.get_color()
        )
    axes.set(xlabel="completions drawn", ylabel="exact KL(π‖π*), nats", yscale="log", xlim=(0, samples))
    figure.legend(loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=150)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", dest="methods", action="append", help="repeat for several; default: see the table")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=6400, help=f"completions, a multiple of {BATCH}")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2], help="which of the toy's prompts, 0 to 2")
    parser.add_argument("--no-exact", action="store_true", help="leave out exact gradients")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--plot", type=Path, default=Path("exact_posterior.png"))
    parser.add_argument("--json", type=Path, help="also write every curve to this file")
    parser.add_argument("--quick", action="store_true", help="one seed, one learning rate, 256 completions")
    args = parser.parse_args(arguments)
    args.methods = args.methods or list(METHODS)
    for method in args.methods:
        if method.partition(":")[0] not in TRAINERS:
            parser.error(f"--method must be {', '.join(TRAINERS)}, with ':' and JSON after it if any; got {method!r}")
    if args.samples <= 0 or args.samples % BATCH:
        parser.error(f"--samples must be a multiple of {BATCH}, got {args.samples}")
    if args.quick:
        args.learning_rates, args.seeds, args.samples = [3e-3], 1, 4 * BATCH
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 170)
    prompts = tuple(args.prompts)
    cells = [
        Cell(method, rate, seed, args.samples, prompts)
        for method in args.methods
        for rate in args.learning_rates
        for seed in range(args.seeds)
    ]
    if not args.no_exact:  # it is not random, so one seed suffices
        cells += [Cell(EXACT, rate, 0, EXACT_STEPS, prompts) for rate in EXACT_LEARNING_RATES]
    results: dict[Cell, Curve] = {}
    for number, (cell, curve) in enumerate(zip(cells, run_cells(cells, args.jobs), strict=True), start=1):
        results[cell] = curve
        console.print(
            f"{number}/{len(cells)} {cell.method}, learning rate {cell.learning_rate:g}, seed {cell.seed}: "
            f"{curve.kl[-1]:.4f} and {curve.forward_kl[-1]:.4f} nats, {curve.seconds:.1f} s",
            highlight=False,
        )
    methods = dict.fromkeys(cell.method for cell in results)
    summaries = [Summary.of(method, results) for method in methods]
    console.print(f"Prior: {summaries[0].curves[0].kl[0]:.3f} nats from the posterior.")
    console.print(results_table(summaries, args.samples))
    plot(summaries, args.samples, args.plot)
    console.print(f"Curves: {args.plot}")
    if args.json is not None:
        rows = [vars(cell) | vars(curve) for cell, curve in results.items()]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
