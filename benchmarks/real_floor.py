"""
How close a real model can come to its posterior at all: trained on as many draws as are wanted, whatever they cost.

    python benchmarks/real_floor.py --shared ../shared
    python benchmarks/real_floor.py --shared ../shared --draws 4096 --epochs 1 --steps 50

`real_posterior.py` gives every method 6,400 completions. What remains after them is of two kinds: what more
completions would take away, and what no setting of the weights would. This script measures the second, in two stages:

1. maximum likelihood on draws of the posterior, which minimises KL(π*‖π). The draws are those of the prior, drawn
   again in proportion to exp(r/β) for each prompt; what is printed as "draws that count" is their effective number.
2. gradient steps on KL(π‖π*) with fresh draws of the policy, many a step, each against the mean of the others of its
   prompt (leave one out).

Distances are those of `real_posterior.py`, from the same draws of the prior, which stage 1 does not see.
"""

import argparse
import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from cached_llama import CachedLlama
from posterior_distances import Draws, distances, over_prompts, prompt_token_ids
from real_posterior_worker import Sizes, Target
from real_tasks import TASKS, Folders
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from rlhf_bayes.commands.quiet import quiet

LEARNING_SEED, POLICY_SEED, VERDICT_SEED = 30_000, 40_000, 50_000
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Optimiser:
    """Adam with a learning rate that falls to 0 in a line, and a bounded norm of the gradient."""

    model: nn.Module
    adam: torch.optim.Adam
    schedule: torch.optim.lr_scheduler.LRScheduler

    @classmethod
    def of(cls, model: nn.Module, learning_rate: float, steps: int) -> "Optimiser":
        adam = torch.optim.Adam(model.parameters(), lr=learning_rate)
        return cls(model, adam, torch.optim.lr_scheduler.LinearLR(adam, 1.0, 1e-3, total_iters=steps))

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.adam.step()
        self.schedule.step()
        self.adam.zero_grad()


def fast(model: nn.Module, target: Target) -> CachedLlama:
    """The model with its weights of this moment, for drawing and scoring."""
    return CachedLlama(model, target.prior.eos_id, target.prior.length)


def log_probs(model: nn.Module, prompt_ids: list[int], ids: Tensor, mask: Tensor) -> Tensor:
    """log π of completions (N, T) of one prompt, with a gradient: (N,), nats."""
    rows = torch.cat([torch.tensor([prompt_ids]).expand(len(ids), -1), ids], 1)
    logits = model(input_ids=rows, use_cache=False).logits[:, len(prompt_ids) - 1 : -1]  # (N, T, V)
    tokens = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return torch.where(mask, tokens, 0.0).sum(-1)


def maximum_likelihood(model: nn.Module, prompts: list[list[int]], draws: Draws, args: argparse.Namespace) -> None:
    """Stage 1: minimises −Σ_c Σ_x w(c, x)·log π(x | c) with w ∝ exp(r/β) over the draws of each prompt."""
    generator, rows = torch.Generator().manual_seed(LEARNING_SEED), args.rows
    weights = draws.log_likelihood.softmax(-1)  # (P, n)
    steps = args.epochs * draws.ids.size(1) // rows
    optimiser = Optimiser.of(model, args.likelihood_rate, steps)
    for _ in track(range(steps), "maximum likelihood"):
        chosen = weights.multinomial(rows, replacement=True, generator=generator)  # (P, rows)
        for prompt, prompt_ids in enumerate(prompts):
            ids, mask = draws.ids[prompt, chosen[prompt]].long(), draws.mask[prompt, chosen[prompt]]
            (-log_probs(model, prompt_ids, ids, mask).mean() / len(prompts)).backward()
        optimiser.step()


def reverse_kl_steps(model: nn.Module, target: Target, args: argparse.Namespace) -> None:
    """Stage 2: E_π[(log π − log π0 − r/β − its mean over the other rows)·∇log π] from fresh draws."""
    task, prompts = target.task, prompt_token_ids(target.task)
    optimiser = Optimiser.of(model, args.policy_rate, args.steps)
    for step in track(range(args.steps), "on-policy"):
        drawn = Draws.of(fast(model, target), task, args.rows, POLICY_SEED + step)
        cost = drawn.log_prob - drawn.under(target.prior, task) - drawn.log_likelihood  # (P, rows)
        advantages = (cost - cost.mean(-1, keepdim=True)) * args.rows / (args.rows - 1)
        for prompt, prompt_ids in enumerate(prompts):
            ours = log_probs(model, prompt_ids, drawn.ids[prompt], drawn.mask[prompt])
            ((advantages[prompt].float() * ours).mean() / len(prompts)).backward()
        optimiser.step()


def stages(target: Target, args: argparse.Namespace, console: Console) -> Iterator[tuple[str, nn.Module]]:
    """The model before each stage and at the end."""
    model = target.task.load_model()
    yield "the prior", model
    draws = Draws.of(target.prior, target.task, args.draws, LEARNING_SEED)
    count = (1 / draws.log_likelihood.softmax(-1).square().sum(-1)).sum().item()
    console.print(f"{draws.ids[..., 0].numel():,} draws of the prior; draws that count: {count:,.0f}", highlight=False)
    maximum_likelihood(model, prompt_token_ids(target.task), draws, args)
    yield "maximum likelihood", model
    reverse_kl_steps(model, target, args)
    yield "then on-policy", model


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="holds models/ and data/")
    parser.add_argument("--output", type=Path, default=Path("runs/real_posterior"), help="that of real_posterior.py")
    parser.add_argument("--task", choices=list(TASKS), default="stories")
    parser.add_argument("--draws", type=int, default=8192, help="of the prior a prompt, for stage 1")
    parser.add_argument("--epochs", type=int, default=1, help="of stage 1")
    parser.add_argument("--steps", type=int, default=200, help="of stage 2")
    parser.add_argument("--rows", type=int, default=16, help="completions a prompt in a step of either stage")
    parser.add_argument("--likelihood-rate", type=float, default=5e-4, help="learning rate of stage 1 at its start")
    parser.add_argument("--policy-rate", type=float, default=1e-4, help="learning rate of stage 2 at its start")
    parser.add_argument("--prior-draws", type=int, default=Sizes.prior, help="draws of the prior a prompt, for log Z")
    args = parser.parse_args(arguments)
    if min(args.draws, args.epochs, args.steps) < 1 or not 2 <= args.rows <= args.draws:
        parser.error("--draws, --epochs and --steps must be 1 or more, and --rows from 2 to --draws")
    if not (args.shared / "models").is_dir():
        parser.error(f"--shared must be a folder with models/ and data/, got {args.shared}, which has no models/")
    return args


def measure(target: Target, args: argparse.Namespace, console: Console) -> list[dict[str, str | float]]:
    """The distances after each stage, printed as they come."""
    found = []
    judge = partial(distances, n=Sizes.verdict, forward_draws=Sizes.forward, seed=VERDICT_SEED)
    for name, model in stages(target, args, console):
        measured = judge(fast(model, target), target.prior, target.task, target.draws)
        assert measured.forward_kl is not None  # `forward_draws` are asked for
        (gap, gap_error), (forward, forward_error) = (
            over_prompts(measured.gap),
            over_prompts(measured.forward_kl),
        )
        by_draws = sum(measured.variance) ** 0.5 / len(measured.variance)
        console.print(
            f"{name}: KL(π‖π*) {gap:.3f} ± {gap_error:.3f} (by draws {by_draws:.3f}), "
            f"KL(π*‖π) {forward:.3f} ± {forward_error:.3f}",
            highlight=False,
        )
        found.append({"stage": name, "gap": gap, "gap_error": gap_error, "gap_error_by_draws": by_draws})
        found[-1] |= {"forward_kl": forward, "forward_kl_error": forward_error}
    return found


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    quiet(threads=1)
    console = Console(width=None if os.isatty(1) else 170)
    folders = Folders(args.shared.resolve(), args.output.resolve())
    folders.output.mkdir(parents=True, exist_ok=True)
    rows = measure(Target.of(args.task, folders, args.prior_draws), args, console)
    with open(folders.output / f"floor_{args.task}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
