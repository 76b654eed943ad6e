"""
Noise of policy gradients towards a posterior, by divergence and baseline, against the exact gradient.

    python benchmarks/gradient_variance.py                         half a minute on one core
    python benchmarks/gradient_variance.py --quick                 a smoke run

The toy is `EnumerableLM` with completions of at most 3 tokens, 585 of them, whose scores ∇log π are all computed once.
An estimate of a gradient is then a weighted sum of scores, and thousands of them, from 4 draws each, need no forward
pass. The exact gradient comes from another route: autograd through the enumerated divergence. Z is known, so that only
the estimator is measured.

- Bias: ‖E ĝ − g‖² over ‖g‖², from all pairs of blocks of estimates, which is unbiased and may be negative; and how
  many standard errors it is from 0.
  With heavy tails, as for renyi_2, few draws miss rare completions: this looks like a bias, which falls with draws.
- Noise: √(E‖ĝ − g‖²) over ‖g‖, for one prompt and 4 draws. With 64 draws it is a quarter of that.

Targets: a reward, one nat from the prior; a condition that a tenth of the prior meets. Policies: the prior, where
training starts, and one most of the way there, at which draws of the prior are off policy.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.numerics import f_divergence, forward_kl
from rlhf_bayes.numerics.dpg import BASELINES, dpg_advantages, dpg_baselines
from rlhf_bayes.numerics.f_divergence import divergence_cases, divergence_of
from rlhf_bayes.numerics.log_variance import log_variance_centres, log_variance_loss
from rlhf_bayes.objectives.gdc_losses import LOG_VARIANCE
from rlhf_bayes.testing import EnumerableLM

PROMPT, DRAWS, BLOCKS = 2, 4, 50


@dataclass(frozen=True)
class Row:
    """Bias and noise of an estimator."""

    target: str
    stage: str
    divergence: str
    baseline: str
    bias: float
    errors: float
    noise: float


class Setting:
    """A policy, its scores, a target, and whether draws come from the policy or from the prior."""

    def __init__(self, toy: EnumerableLM, policy: torch.nn.Module, log_target: Tensor, on_policy: bool):
        self.parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.log_policy = toy.log_probs(policy)[PROMPT]  # (N,), with gradient
        self.log_target, self.on_policy = log_target, on_policy  # (N,)
        self.log_proposal = self.log_policy.detach() if on_policy else toy.log_prior[PROMPT]
        self.scores = self._gradients(self.log_policy)  # (N, D)
        self.gram = self.scores @ self.scores.T  # (N, N)

    def exact(self, divergence: str, alpha: float | None) -> Tensor:
        """Gradient of the divergence: (D,)."""
        loss = f_divergence(self.log_target.double(), self.log_policy.double().log_softmax(-1), divergence, alpha)
        return self._gradients(loss[None])[0]

    def _gradients(self, outputs: Tensor) -> Tensor:
        rows = []
        for chunk in torch.eye(len(outputs), dtype=outputs.dtype).split(65):
            gradients = torch.autograd.grad(
                outputs, self.parameters, chunk, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
            rows.append(torch.cat([g.flatten(1) for g in gradients if g is not None], dim=-1))
        return torch.cat(rows).double()

    def draws(self, groups: int, generator: torch.Generator) -> Tensor:
        """Indices of completions drawn for a prompt: (groups, DRAWS)."""
        flat = torch.multinomial(self.log_proposal.exp(), groups * DRAWS, replacement=True, generator=generator)
        return flat.view(groups, DRAWS)


def dpg_coefficients(setting: Setting, draws: Tensor, divergence: str, alpha: float | None, baseline: str) -> Tensor:
    """Weight of each draw's score in the gradient of its group's loss: (groups, DRAWS)."""
    x = draws.flatten()
    log_probs = (setting.log_target[x], setting.log_policy.detach()[x], setting.log_proposal[x])
    groups = torch.arange(len(draws)).repeat_interleave(DRAWS)
    baselines = dpg_baselines(*log_probs, groups, divergence, alpha, baseline)
    return -dpg_advantages(*log_probs, baselines, divergence, alpha).advantages.view_as(draws) / DRAWS


def log_variance_coefficients(setting: Setting, draws: Tensor) -> Tensor:
    """Weight of each draw's score in the gradient of the log-variance loss: (groups, DRAWS)."""
    x = draws.flatten()
    log_policy = setting.log_policy.detach()[x].requires_grad_()
    # p instead of π0·exp(log_likelihood): their logarithms differ by a constant, which does not change the variance
    evidence = (log_policy, torch.zeros_like(log_policy), setting.log_target[x])
    groups = torch.arange(len(draws)).repeat_interleave(DRAWS)
    loss = log_variance_loss(*evidence, log_variance_centres(*evidence, groups)).sum() / DRAWS
    return torch.autograd.grad(loss, log_policy)[0].view_as(draws)


def measure(setting: Setting, exact: Tensor, draws: Tensor, coefficients: Tensor) -> tuple[float, float, float]:
    """Bias, its distance from 0 in standard errors, and noise, as the module's docstring defines them."""
    coefficients, gram = coefficients.double(), setting.gram
    norm, along = exact.square().sum().item(), setting.scores @ exact  # (), (N,)
    # the squared norm of an estimate Σ c·∇log π is c K c, with K the Gram matrix of the scores
    inner = gram[draws[:, :, None], draws[:, None, :]]  # (groups, DRAWS, DRAWS)
    mean_square = torch.einsum("gi,gij,gj->g", coefficients, inner, coefficients).mean().item()
    size = len(draws) // BLOCKS
    means = torch.zeros(BLOCKS, len(gram), dtype=torch.float64)  # (BLOCKS, N), weights of the scores
    means.scatter_add_(1, draws.reshape(BLOCKS, -1), coefficients.reshape(BLOCKS, -1) / size)
    shift = means @ along  # (BLOCKS,)
    products = means @ gram @ means.T - shift[:, None] - shift + norm  # (BLOCKS, BLOCKS), of errors
    pairs = products[~torch.eye(BLOCKS, dtype=torch.bool)]
    # each pair is counted twice, and pairs are uncorrelated where the bias is 0
    standard_error = pairs.std().item() / math.sqrt(len(pairs) / 2)
    # E‖ĝ‖² − 2·E[ĝ]·g + ‖g‖²
    noise = math.sqrt(max(mean_square - 2 * shift.mean().item() + norm, 0.0) / norm)
    return pairs.mean().item() / norm, pairs.mean().item() / standard_error, noise


def trained_towards(toy: EnumerableLM, log_target: Tensor, steps: int) -> torch.nn.Module:
    """The prior after `steps` exact gradient steps on KL(p‖π)."""
    policy = toy.random_policy(noise=0.0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        forward_kl(log_target, toy.log_probs(policy)[PROMPT]).backward()
        optimizer.step()
    return policy


def targets(toy: EnumerableLM) -> dict[str, Tensor]:
    """log p of every completion, (N,) each."""
    log_prior = toy.log_prior[PROMPT]
    # the condition is to hold the token that about a tenth of the prior's completions hold
    held = torch.tensor([[token in ids for token in range(toy.vocab_size)] for ids in toy.completion_ids])  # (N, V)
    shares = log_prior.exp() @ held.float()  # (V,)
    allowed = held[:, (shares - 0.1).abs().argmin()]
    condition = log_prior.masked_fill(~allowed, -torch.inf)
    return {
        "reward": (log_prior + toy.log_likelihood[PROMPT]).log_softmax(-1),
        f"condition, Z = {condition.exp().sum():.2f}": condition.log_softmax(-1),
    }


def rows_of(target: str, stage: str, setting: Setting, groups: int, generator: torch.Generator) -> list[Row]:
    """Every divergence and baseline that the target allows, on the same draws."""
    draws = setting.draws(groups, generator)
    forbids = bool((setting.log_target == -torch.inf).any())
    rows = []
    for divergence, alpha in divergence_cases():
        if forbids and divergence_of(divergence, alpha).infinite_where_forbidden:
            continue
        name, exact = divergence if alpha is None else f"alpha {alpha}", setting.exact(divergence, alpha)
        for baseline in BASELINES:
            coefficients = dpg_coefficients(setting, draws, divergence, alpha, baseline)
            rows.append(Row(target, stage, name, baseline, *measure(setting, exact, draws, coefficients)))
    if setting.on_policy and not forbids:  # otherwise its gradient is not that of the reverse KL
        exact = setting.exact("reverse_kl", None)  # which is the gradient of the log-variance loss on policy
        figures = measure(setting, exact, draws, log_variance_coefficients(setting, draws))
        rows.append(Row(target, stage, LOG_VARIANCE, "mean of the draws", *figures))
    return rows


def results_table(rows: list[Row]) -> Table:
    table = Table(title=f"Gradients from {DRAWS} draws of a prompt, in units of the exact gradient")
    for name in ("target", "policy", "divergence", "baseline", "bias²", "standard errors", "noise"):
        table.add_column(name, justify="right" if name in ("bias²", "standard errors", "noise") else "left")
    least = {}
    for row in rows:
        key = (row.target, row.stage, row.divergence)
        least[key] = min(least.get(key, math.inf), row.noise)
    previous = None
    for row in rows:
        if previous not in (None, (row.target, row.stage)):
            table.add_section()
        first = previous != (row.target, row.stage)
        previous = (row.target, row.stage)
        style = "bold" if row.noise == least[(row.target, row.stage, row.divergence)] else "default"
        table.add_row(
            row.target if first else "",
            row.stage if first else "",
            row.divergence,
            row.baseline,
            f"{row.bias:.1e}",
            f"[{'red' if abs(row.errors) > 5 else 'default'}]{row.errors:.1f}[/]",
            f"[{style}]{row.noise:.2f}[/]",
        )
    return table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=50_000, help=f"estimates, a multiple of {BLOCKS}")
    parser.add_argument("--steps", type=int, default=10, help="exact Adam steps to the second policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write every row to this file")
    parser.add_argument("--quick", action="store_true", help="1,000 estimates")
    args = parser.parse_args(arguments)
    if args.groups <= 0 or args.groups % BLOCKS:
        parser.error(f"--groups must be a multiple of {BLOCKS}, got {args.groups}")
    if args.quick:
        args.groups = 1000
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    quiet(threads=1)
    console = Console(width=None if sys.stdout.isatty() else 140)
    toy, generator = EnumerableLM("gpt2", max_completion_length=3), torch.Generator().manual_seed(args.seed)
    rows = []
    for target, log_target in targets(toy).items():
        policies = {
            "prior": (toy.random_policy(noise=0.0), True),
            f"after {args.steps} steps": (trained_towards(toy, log_target, args.steps), True),
        }
        policies["the same, draws of the prior"] = (policies[f"after {args.steps} steps"][0], False)
        for stage, (policy, on_policy) in policies.items():
            setting = Setting(toy, policy, log_target, on_policy)
            distance = forward_kl(log_target, setting.log_policy.detach()).item()
            rows += rows_of(target, f"{stage}: {distance:.2f} nats", setting, args.groups, generator)
    console.print(results_table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
