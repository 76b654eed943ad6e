r"""
The cost of samplers: errors of E[r] and of log Z under the posterior, against tokens run and seconds.

    python benchmarks/samplers.py                    about 15 minutes on one core
    python benchmarks/samplers.py --quick            a smoke run of everything
    python benchmarks/samplers.py --model ../shared/models/stories260K --beta 0.25 \
        --reward rlhf_bayes.toy.rewards:vader_reward --prompt 'Once upon a time, there was a' --prompt 'Tom was sad.'

On the toy of `rlhf_bayes.testing.EnumerableLM` (4,681 completions of each of 3 prompts, β = 0.5) the exact values are
known by enumeration. On a language model, by default the bundled one with its sentiment reward, they come from a long
importance run. Its standard error is printed, and smaller errors cannot be measured. Errors are root mean squares over
prompts and repetitions. The sampler's own error bars are shown too, and should be the same.

Tokens are all positions that the model was run on, prompts, scoring and padding included. Seconds are of the CPU, and
include the reward. Best of n has no error bar, since it draws from another distribution at any cost. GUARD, on a
condition of the toy, keeps the policy's draws that the condition allows: its error bar is that of its own mean, which
is not exactly the posterior's. PPLM follows a linear forecast of the evidence; backward passes do not count as tokens.

Then two measurements of speed: our decoding loop compared with `generate`, and the gain of SMC from decoding the
particles of 8 prompts at once.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # hide the samplers' progress bars, which would disturb our own

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sampler_tasks import Task, condition_task, log_z_error_bar, methods_of, model_task, root_mean_square, toy_task

from rlhf_bayes import LanguageModel
from rlhf_bayes import toy as bundled
from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.lm.decoding import Decoding, draw_tokens
from rlhf_bayes.lm.forward import base_causal_lm
from rlhf_bayes.lm.generation import raw_generation_config
from rlhf_bayes.samplers import SMC, Sampler, expectation


@dataclass
class Cost:
    """The cost of the code that ran within [`measured`]."""

    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Point:
    """A sampler at one size: medians and root mean squares over repetitions."""

    task: str
    method: str
    n: int
    tokens: float
    seconds: float
    reward_error: float
    reward_error_bar: float | None
    log_z_error: float | None
    log_z_error_bar: float | None


@contextmanager
def measured(lm: LanguageModel) -> Iterator[Cost]:
    """A context that counts the positions that the model is run on, padding too, and the CPU's seconds."""
    cost = Cost()

    def count(_, args, kwargs):
        cost.tokens += (args[0] if args else kwargs["input_ids"]).numel()

    hook = base_causal_lm(lm.model).base_model.register_forward_pre_hook(count, with_kwargs=True)
    start = time.process_time()
    try:
        yield cost
    finally:
        cost.seconds = time.process_time() - start
        hook.remove()


def measure(task: Task, method: str, sampler: Sampler, n: int, repetitions: int) -> Point:
    """Errors and cost of n completions for each prompt."""
    costs, reward_errors, reward_bars, log_z_errors, log_z_bars = [], [], [], [], []
    for seed in range(repetitions):
        generator = torch.Generator().manual_seed(seed)
        with measured(task.posterior.prior) as cost:
            draws = sampler.sample(task.posterior, task.prompts, n, generator)
        costs.append(cost)
        rewards = task.rewards_of(draws).double().cpu()
        if draws.guarantee == "none":
            means = [rewards[draws.prompt_index == prompt].mean() for prompt in range(draws.num_prompts)]
            reward_errors.append(torch.stack(means) - task.reward)
            continue
        found = expectation(draws, rewards)
        reward_errors.append(found.mean - task.reward)
        reward_bars.append(found.standard_error)
        if draws.log_z is not None:
            log_z_errors.append(draws.log_z.log_z - task.log_z)
            log_z_bars.append(log_z_error_bar(draws))
    return Point(
        task.name,
        method,
        n,
        statistics.median(cost.tokens for cost in costs),
        statistics.median(cost.seconds for cost in costs),
        root_mean_square(torch.stack(reward_errors)),
        root_mean_square(torch.stack(reward_bars)) if reward_bars else None,
        root_mean_square(torch.stack(log_z_errors)) if log_z_errors else None,
        root_mean_square(torch.stack(log_z_bars)) if log_z_bars else None,
    )


def decoding_times(lm: LanguageModel, prompts: Sequence[str], n: int, repetitions: int) -> dict[str, list[float]]:
    """
    CPU seconds per token of completions drawn from the prior, measured in turns in three ways.

    By `generate`; by our loop on the same P · n rows; by our loop as samplers use it, which reads each prompt once.
    """
    rows = [prompt for prompt in prompts for _ in range(n)]
    prompt_ids = lm.prompt_token_ids(rows)

    def by_generate(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.no_grad(), raw_generation_config(lm.model):
            return sum(map(len, lm.generate_ids(prompt_ids, lm.max_completion_length)))

    def by_our_loop(seed: int, prompts: Sequence[str], n: int) -> int:
        generator = torch.Generator(lm.device).manual_seed(seed)
        decoding = Decoding(lm, prompts, n)
        while decoding.rows.numel():
            decoding.append(draw_tokens(decoding.log_probs, generator))
        return sum(map(len, decoding.token_ids()))

    ways: dict[str, Callable[[int], int]] = {
        "`generate`": by_generate,
        "our loop": lambda seed: by_our_loop(seed, rows, 1),
        "our loop, prompts read once": lambda seed: by_our_loop(seed, prompts, n),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, run in ways.items():
            start = time.process_time()
            tokens = run(repetition)
            if repetition > 0:  # the first repetition is a warm-up
                times[name].append((time.process_time() - start) / tokens)
    return times


def smc_times(task: Task, prompts: Sequence[str], particles: int, repetitions: int) -> dict[str, list[float]]:
    """CPU seconds of SMC with the prefix reward on all prompts at once, and on one after the other."""
    sampler, prior = SMC(task.values["prefix reward"]), task.posterior.prior
    times: dict[str, list[float]] = {"at once": [], "one at a time": []}
    before = prior.batch_size
    for repetition in range(repetitions):
        for name, size in zip(times, (particles * len(prompts), particles), strict=True):
            prior.batch_size = size
            start = time.process_time()
            sampler.sample(task.posterior, prompts, particles, torch.Generator().manual_seed(repetition))
            times[name].append(time.process_time() - start)
    prior.batch_size = before
    return times


def points_table(task: Task, points: Sequence[Point]) -> Table:
    caption = "error: root mean square over prompts and repetitions; bar: the sampler's own standard error"
    if task.known_to != (0.0, 0.0):
        caption += f". The truth is known to {task.known_to[0]:.4f} and {task.known_to[1]:.4f} nats"
    beta = "" if task.beta is None else f", β = {task.beta:g}"
    table = Table(title=f"{task.name}: {len(task.prompts)} prompts{beta}", caption=caption)
    table.add_column("sampler")
    for name in ("n", "tokens", "CPU s", r"E\[r] error", "bar", "log Z error", "bar"):
        table.add_column(name, justify="right")
    last = None
    for point in points:
        if last is not None and point.method != last:
            table.add_section()
        errors = (point.reward_error, point.reward_error_bar, point.log_z_error, point.log_z_error_bar)
        cells = ("–" if error is None else f"{error:.4f}" for error in errors)
        sizes = f"{point.n:,}", f"{point.tokens:,.0f}", f"{point.seconds:.2f}"
        table.add_row("" if point.method == last else point.method, *sizes, *cells)
        last = point.method
    return table


def plot(tasks: Sequence[Task], points: Sequence[Point], path: Path) -> None:
    """Error against tokens, both on log scales; a row of panels for each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2 * len(tasks) + 1.2), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    methods = list(dict.fromkeys(point.method for point in points))
    markers = "os^vDPX*<>"
    for row, task in zip(axes, tasks, strict=True):
        for panel, what, floor in zip(row, ("reward_error", "log_z_error"), task.known_to, strict=True):
            for number, method in enumerate(methods):
                found = [point for point in points if (point.task, point.method) == (task.name, method)]
                line = [(point.tokens, getattr(point, what)) for point in found if getattr(point, what) is not None]
                style = {"marker": markers[number % len(markers)], "color": f"C{number}", "markersize": 4}
                if line:
                    panel.plot(*zip(*line, strict=True), **style)
            if floor:
                panel.axhline(floor, color="black", linestyle=":")
            panel.set(xscale="log", yscale="log", xlabel="tokens run through the model")
            panel.set(ylabel="error of E[r]" if what == "reward_error" else "error of log Z, nats", title=task.name)
            panel.grid(alpha=0.3, which="both", linewidth=0.5)
    handles = [
        axes[0][0].plot([], [], marker=markers[number % len(markers)], color=f"C{number}", markersize=4)[0]
        for number in range(len(methods))
    ]
    figure.legend(handles, methods, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)


def speed_table(title: str, times: dict[str, list[float]], unit: str, scale: float) -> Table:
    """Medians, and the median of the ratios to the first within each turn."""
    table, (base, *_) = Table("", title=title), times.values()
    for name in ("CPU", f"to {next(iter(times))}"):
        table.add_column(name, justify="right")
    for name, row in times.items():
        ratio = statistics.median(time / first for time, first in zip(row, base, strict=True))
        table.add_row(name, f"{scale * statistics.median(row):.3g} {unit}", f"{ratio:.2f}")
    return table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled.model_path(), help="a causal LM; default: the bundled one")
    parser.add_argument("--reward", default="rlhf_bayes.toy.rewards:sentiment_reward", help="in [-1, 1]")
    parser.add_argument("--prompt", dest="prompts", action="append", help="repeat for several")
    parser.add_argument("--beta", type=float, default=0.25)
    parser.add_argument("--max-completion-length", type=int, default=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 256], help="completions a prompt")
    parser.add_argument("--method", dest="methods", action="append", help="only this sampler; repeat for several")
    parser.add_argument("--repetitions", type=int, default=8, help="repetitions on the toy; half as many on the model")
    parser.add_argument(
        "--reference", type=int, default=4096, help="completions per prompt of the long importance run"
    )
    parser.add_argument("--plot", type=Path, default=Path("samplers.png"))
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, once")
    args = parser.parse_args(arguments)
    args.prompts = args.prompts or bundled.prompts()[:2]
    for name in ("repetitions", "reference"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if any(size < 8 or size % 8 for size in args.sizes):
        parser.error(f"--sizes must be multiples of 8, got {args.sizes}: chains of one length have an error bar")
    if args.quick:
        args.sizes, args.repetitions, args.reference = [32], 1, 64
    args.speed = (1, 8) if args.quick else (5, 64)  # repetitions, completions per prompt
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    quiet(threads=1)
    console = Console(width=None if sys.stdout.isatty() else 130)
    tasks = [toy_task(), condition_task(), model_task(args)]
    known = list(dict.fromkeys(name for task in tasks for name in methods_of(task)))
    for name in args.methods or []:
        if name not in known:
            raise SystemExit(f"--method must be one of {', '.join(known)}; got {name!r}")

    points: list[Point] = []
    for task in tasks:
        cells = [
            (name, method, n)
            for name, method in methods_of(task).items()
            if args.methods is None or name in args.methods
            for n in args.sizes
        ]
        repetitions = math.ceil(args.repetitions / 2) if task is tasks[-1] else args.repetitions
        of_task = [
            measure(task, name, method(n), n, repetitions)
            for name, method, n in track(cells, task.name, transient=True)
        ]
        points += of_task
        if of_task:
            console.print(points_table(task, of_task))
    plot(tasks, points, args.plot)

    task, (repetitions, n) = tasks[-1], args.speed
    lm = task.posterior.prior
    prompts = (task.prompts * 8)[:8]
    decoding = decoding_times(lm, prompts, n, repetitions)
    console.print(speed_table(f"Decoding, {8 * n} completions of the prior", decoding, "ms a token", 1e3))
    smc = smc_times(task, prompts, n, max(repetitions // 2, 1))
    console.print(speed_table(f"SMC, {n} particles of each of 8 prompts", smc, "s", 1))
    console.print(f"Curves: {args.plot}", highlight=False)
    if args.json is not None:
        rows = {"points": [vars(point) for point in points], "decoding": decoding, "smc": smc}
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
