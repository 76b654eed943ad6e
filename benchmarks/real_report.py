"""Table, CSV, JSON and figure of `real_posterior.py`."""

import csv
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from posterior_distances import Reference, over_prompts
from real_posterior_worker import Run, Target
from rich.console import Console

BASELINE = "RLOO"  # with which methods are compared
Results = Mapping[Run, dict[str, Any]]


@dataclass(frozen=True)
class Number:
    """A mean over prompts with its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Summary:
    """A method on a task, at its learning rate."""

    task: str
    method: str
    learning_rate: str
    """The word "adapted" where the trainer changes it."""
    by_rate: dict[float, float]
    """KL(π‖π*) of the runs that chose the rate."""
    gaps: torch.Tensor
    """(seeds, prompts)."""
    forward_kls: torch.Tensor
    """(seeds, prompts)."""
    draws_error: float
    """Standard error of the mean KL(π‖π*) for these prompts and these policies."""
    reward: float
    kl_to_prior: float
    forward_ess: float
    logged_gap: float | None
    """The trainer's own `posterior/gap` at the end."""
    batch_errors: dict[str, float]
    seconds: float

    @classmethod
    def of(cls, results: Results, task: str, method: str) -> "Summary":
        rows = [
            (run, r) for run, r in results.items() if (run.task, run.name, run.for_verdict) == (task, method, True)
        ]
        found = [result["distances"] for _, result in rows]
        gaps = torch.tensor([one["gap"] for one in found], dtype=torch.float64)
        variances = torch.tensor([one["variance"] for one in found], dtype=torch.float64)
        logged = [r["logged"]["posterior/gap"] for _, r in rows if "posterior/gap" in r["logged"]]

        def mean(name: str) -> float:
            return statistics.mean(statistics.mean(one[name]) for one in found)

        return cls(
            task,
            method,
            "adapted" if rows[0][0].method.options.get("adapt_learning_rate") else f"{rows[0][0].learning_rate:g}",
            choices_of(results, task, method),
            gaps,
            torch.tensor([one["forward_kl"] for one in found], dtype=torch.float64),
            # of one run: runs share the draws of the prior
            math.sqrt(variances.mean(0).sum()) / gaps.size(1),
            mean("reward"),
            mean("kl_to_prior"),
            statistics.mean(one["forward_ess"] for one in found),
            statistics.mean(logged) if logged else None,
            {
                key: statistics.mean(statistics.mean(one["batch_log_z_error"][key]) for one in found)
                for key in found[0]["batch_log_z_error"]
            },
            statistics.mean(result["seconds"]["training"] for _, result in rows),
        )

    @property
    def gap(self) -> Number:
        return averaged(self.gaps)

    @property
    def forward_kl(self) -> Number:
        return averaged(self.forward_kls)


def averaged(table: torch.Tensor) -> Number:
    """
    The mean of (seeds, prompts), with an error clustered by prompt, to which the error over seeds is added.

    Two errors are added as variances; a little noise of the draws is counted in both.
    """
    mean, by_prompt = over_prompts(table.mean(0).tolist())
    seeds = table.mean(1)
    by_seed = (seeds.std() / math.sqrt(len(seeds))).item() if len(seeds) > 1 else 0.0
    return Number(mean, math.hypot(by_prompt, by_seed))


def choices_of(results: Results, task: str, method: str) -> dict[float, float]:
    """Learning rate -> mean KL(π‖π*) of the run that tried it."""
    return {
        run.learning_rate: statistics.mean(result["distances"]["gap"])
        for run, result in sorted(results.items(), key=lambda item: item[0].learning_rate)
        if (run.task, run.name, run.for_verdict) == (task, method, False)
    }


def summaries_of(results: Results) -> list[Summary]:
    keys = dict.fromkeys((run.task, run.name) for run in results)
    return [Summary.of(results, *key) for key in keys]


COLUMNS = (
    "method",
    "learning rate",
    "KL(π‖π*)",
    "seeds",
    "beside RLOO",
    "KL(π*‖π)",
    "reward",
    "KL(π‖π0)",
    "`posterior/gap`",
    "s",
)


def table_rows(summaries: list[Summary]) -> list[list[str]]:
    """The rows of one task."""
    baseline = next((one for one in summaries if one.method == BASELINE), None)
    rows = []
    for one in summaries:
        # prompts are shared, so their differences have a smaller error; seeds are not, so their errors are added
        beside = ""
        if baseline is not None and baseline is not one:
            seeds = min(len(one.gaps), len(baseline.gaps))
            beside = str(averaged(one.gaps[:seeds] - baseline.gaps[:seeds]))
        seeds = one.gaps.mean(1)
        rows.append(
            [
                one.method,
                one.learning_rate,
                str(one.gap),
                " ".join(f"{gap:.3f}" for gap in seeds.tolist()),
                beside,
                str(one.forward_kl),
                f"{one.reward:.3f}",
                f"{one.kl_to_prior:.3f}",
                "" if one.logged_gap is None else f"{one.logged_gap:.3f}",
                f"{one.seconds:.0f}",
            ]
        )
    return rows


def markdown(rows: list[list[str]], columns: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in ([*columns], *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def prior_sentence(target: Target) -> str:
    """What is known of a task before any training."""
    found = Reference.of(target.draws.log_likelihood)
    draws = math.sqrt(found.variance.sum()) / len(found.log_z)
    return (
        f"{len(found.log_z)} prompts, β = {target.task.beta:g}. The prior: KL(π0‖π*) = "
        f"{Number(*over_prompts(found.prior_kl.tolist()))}, KL(π*‖π0) = "
        f"{Number(*over_prompts(found.kl_to_prior.tolist()))}, log Z = {found.log_z.mean():.3f} nats, ± {draws:.3f} "
        f"from {target.draws.log_prob.size(1)} draws of the prior a prompt, of which {found.ess.min():.0f} to "
        f"{found.ess.max():.0f} count."
    )


def gap_sentences(summaries: list[Summary]) -> str:
    """How wrong log Z is that is estimated from the completions of one prompt in one batch."""
    columns = tuple(summaries[0].batch_errors)
    rows = [[one.method, *(f"{one.batch_errors[key]:+.3f}" for key in columns)] for one in summaries]
    return markdown(rows, ("error of log Z from as many completions", *columns))


def write_report(results: Results, targets: Mapping[str, Target], folder: Path, console: Console) -> None:
    """Prints the tables, and writes them, a CSV, all results as JSON, and a figure."""
    summaries = summaries_of(results)
    parts = []
    for task, target in targets.items():
        own = [one for one in summaries if one.task == task]
        errors = statistics.mean(one.draws_error for one in own)
        parts.append(
            f"## {task}\n\n{prior_sentence(target)} The error of a run's KL(π‖π*) by its draws is {errors:.3f}.\n\n"
            f"{markdown(table_rows(own), COLUMNS)}\n\n{gap_sentences(own)}"
        )
    text = "\n\n".join(parts) + "\n"
    print(text)
    (folder / "real_posterior.md").write_text(text, encoding="utf-8")
    (folder / "real_posterior.json").write_text(json.dumps(list(results.values()), indent=1) + "\n")
    with open(folder / "real_posterior.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("task", *COLUMNS))
        for task in targets:
            own = [one for one in summaries if one.task == task]
            writer.writerows([task, *row] for row in table_rows(own))
    plot(summaries, list(targets), folder / "real_posterior.png")
    console.print(f"Table, CSV, JSON and figure: {folder}", highlight=False)


def plot(summaries: list[Summary], tasks: list[str], path: Path) -> None:
    """For each task, KL(π‖π*) by learning rate, and at the best one for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = list(dict.fromkeys(one.method for one in summaries))
    colours = dict(zip(methods, plt.colormaps["tab20"].colors, strict=False))
    height = 1.2 + 0.32 * len(methods)
    figure, axes = plt.subplots(
        len(tasks), 2, figsize=(11, max(3.0, height) * len(tasks)), layout="constrained", squeeze=False
    )
    for row, task in zip(axes, tasks, strict=True):
        own = [one for one in summaries if one.task == task]
        for one in own:
            row[0].plot(list(one.by_rate), list(one.by_rate.values()), "o-", color=colours[one.method], ms=3)
        row[0].set(xscale="log", xlabel="learning rate", ylabel="KL(π‖π*), nats", title=f"{task}: choice of the rate")
        for position, one in enumerate(reversed(own)):
            gap = one.gap
            row[1].errorbar(gap.mean, position, xerr=gap.error, fmt="none", color=colours[one.method], capsize=2)
            seeds = one.gaps.mean(1).tolist()
            row[1].plot(seeds, [position] * len(seeds), "o", color=colours[one.method], ms=4)
        row[1].set_yticks(range(len(own)), [one.method for one in reversed(own)], fontsize="small")
        row[1].set(xlabel="KL(π‖π*), nats", title=f"{task}: fresh draws, one point a seed")
    figure.savefig(path, dpi=130)
    plt.close(figure)
