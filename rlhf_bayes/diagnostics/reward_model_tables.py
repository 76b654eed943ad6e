"""Tables and images of reward models: metrics, calibration, and gold reward against proxy reward."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from rlhf_bayes.numerics.calibration import ReliabilityBins

# metric: (heading, with line breaks so that the table fits 80 columns; decimals)
_COLUMNS = {
    "accuracy": ("accuracy", 3),
    "log_loss": ("log\nloss\n(nats)", 3),
    "log_loss_member": ("of a\nmember\n(nats)", 3),
    "brier": ("Brier", 3),
    "ece": ("ECE", 3),
    "vote_accuracy": ("votes\nright", 3),
    "vote_ceiling": ("at\nmost", 3),
    "disagreement": ("sd\nof Δ", 2),
    "disagreement_vote": ("split", 2),
}


def preference_table(metrics: Mapping[str, Mapping[str, float]], title: str | None = None) -> Table:
    """
    A row per reward model, a column per metric of [`~rlhf_bayes.numerics.preference_metrics`].

    "of a member" is the log loss of a single member, "votes right, at most" the accuracy on single votes and its upper
    bound by the annotators' agreement, "sd of Δ" the standard deviation over members, in units of reward, and "split"
    the share of pairs on which members prefer different texts. Columns that no model has are left out; "–" stands for
    a missing metric.

    Args:
        metrics (`Mapping[str, Mapping[str, float]]`):
            Name -> metrics, with or without the prefix `eval_` of `trainer.evaluate()`; other entries are ignored.
        title (`str`, *optional*):
            Title of the table.

    Raises:
        ValueError: if a model has none of these metrics.
    """
    rows = {name: {key.removeprefix("eval_"): value for key, value in row.items()} for name, row in metrics.items()}
    for name, row in rows.items():
        if not row.keys() & _COLUMNS.keys():
            raise ValueError(
                f"`metrics[{name!r}]` must hold metrics of preferences (accuracy, log_loss, …), got {sorted(row)}. "
                "Pass what `preference_metrics` or `trainer.evaluate()` returns."
            )
    kept = {metric: column for metric, column in _COLUMNS.items() if any(metric in row for row in rows.values())}
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("")
    for heading, _ in kept.values():
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(map(len, heading.split("\n"))))
    for name, row in rows.items():
        table.add_row(
            escape(name),
            *(f"{row[metric]:.{digits}f}" if metric in row else "–" for metric, (_, digits) in kept.items()),
        )
    intervals = [
        f"{escape(name)} {row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}"
        for name, row in rows.items()
        if "accuracy_low" in row
    ]
    if intervals:  # columns for them would not fit into 80 characters
        table.caption = f"Accuracy, 95% interval over pairs: {'; '.join(intervals)}."
        table.caption_justify = "left"
    return table


def plot_reliability(
    bins: ReliabilityBins | Mapping[str, ReliabilityBins], path: str | Path, num_pairs: int | None = None
) -> None:
    """
    Reliability diagram as an image: how often predictions of a given confidence come true.

    Each model has a colour. A second panel shows how many pairs have that confidence. A calibrated model lies on the
    diagonal, an overconfident one below it.

    Args:
        bins (`ReliabilityBins` or `Mapping[str, ReliabilityBins]`):
            From [`~rlhf_bayes.numerics.reliability_bins`]; by name for several models.
        path (`str` or `Path`):
            Where the image goes; the suffix gives its format.
        num_pairs (`int`, *optional*):
            Total number of pairs, the same for each model. Bars are then counts, and points get error bars of two
            standard errors for single labels (those of several votes would be narrower).

    Raises:
        ValueError: if there is no model, or `num_pairs` is below 1.

    Source: Guo et al. 2017, arXiv 1706.04599, figure 1.
    """
    # Figure rather than pyplot, which would need a display and could change the caller's backend
    from matplotlib.figure import Figure

    named = {"": bins} if isinstance(bins, ReliabilityBins) else dict(bins)
    if not named:
        raise ValueError("`bins` must hold at least one model, got none. Pass `reliability_bins(prob, target)`.")
    if num_pairs is not None and num_pairs < 1:
        raise ValueError(f"`num_pairs` must be at least 1, got {num_pairs}: it is the number of pairs in all bins.")
    figure = Figure(figsize=(5.2, 6.2), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    for index, (name, model) in enumerate(named.items()):
        _draw_reliability(axes, counts, name, model, (index, len(named)), num_pairs)
    axes.set(ylabel="votes for the predicted text (share)", xlim=(0.48, 1.02), title="Reliability")
    axes.set_ylim(min(0.45, axes.get_ylim()[0]), 1.02)
    counts.set(ylabel="share of pairs" if num_pairs is None else "pairs", xlabel="confidence max(p, 1 − p)")
    axes.legend(loc="upper left", frameon=False)
    for part in (axes, counts):
        part.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _draw_reliability(axes, counts, name: str, bins: ReliabilityBins, place: tuple[int, int], num_pairs: int | None):
    """Draw points in `axes` and bars in `counts`; `place` = (index of the model, number of models)."""
    index, num_models = place
    color = f"C{index}"
    width = 0.5 / len(bins.weight)
    size = bins.weight * (num_pairs or 1)  # (num_bins,)
    filled = bins.weight > 0
    confidence, accuracy = bins.confidence[filled].numpy(), bins.accuracy[filled].numpy()
    error = None
    if num_pairs is not None:
        error = 2 * ((bins.accuracy * (1 - bins.accuracy))[filled] / size[filled]).sqrt().numpy()
    axes.errorbar(confidence, accuracy, error, color=color, marker="o", markersize=4, capsize=2, label=name or None)
    starts = [0.5 + width * (row + (index + 0.5) / num_models * 0.9 + 0.05) for row in range(len(size))]
    bars = counts.bar(starts, size.numpy(), width=0.9 * width / num_models, color=color)
    if num_pairs is not None and num_models == 1:
        counts.bar_label(bars, [f"{value:.0f}" for value in size.tolist()], fontsize=8)


def plot_overoptimization(
    runs: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    path: str | Path,
    xlabel: str = "optimizer step",
    ylabel: str = "reward",
) -> None:
    """
    Image of proxy reward (dashed) and gold reward (solid), one colour per model; a dot marks the best gold reward.

    A proxy that rises while gold falls is over-optimised. Give both in the same unit, normalised on the same
    completions, and compare models at the same KL: with d = √KL, gold follows d(α − β·log d) under RL, and
    d(α − β·d) for the best of n.

    Args:
        runs (`Mapping[str, tuple]`):
            Name -> (x, proxy, gold), three sequences of the same length; x is steps, or √KL(policy‖prior) in √nats.
        path (`str` or `Path`):
            Where the image goes; the suffix gives its format.
        xlabel (`str`, defaults to `"optimizer step"`):
            Label of x, with its unit.
        ylabel (`str`, defaults to `"reward"`):
            Label of the rewards, with their unit.

    Raises:
        ValueError: if there is no run, or its sequences are empty, not finite or of different lengths.

    Source: Gao, Schulman & Hilton 2023, arXiv 2210.10760, figure 1.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not runs:
        raise ValueError("`runs` must hold at least one run, got none.")
    for name, columns in runs.items():
        _check_run(name, columns)
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, (x, proxy, gold) in enumerate(runs.values()):
        axes.plot(x, proxy, color=f"C{index}", linestyle="--", linewidth=1.2)
        axes.plot(x, gold, color=f"C{index}")
        best = max(range(len(gold)), key=lambda row: gold[row])
        axes.plot(x[best], gold[best], color=f"C{index}", marker="o")
    handles = [Line2D([], [], color=f"C{index}", label=name) for index, name in enumerate(runs)]
    handles += [
        Line2D([], [], color="0.3", linestyle="--", linewidth=1.2, label="proxy"),
        Line2D([], [], color="0.3", marker="o", label="gold, and its best"),
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _check_run(name: str, columns: Sequence[Sequence[float]]) -> None:
    lengths = [len(column) for column in columns]
    if len(lengths) != 3 or len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(
            f"`runs[{name!r}]` must be (x, proxy, gold) of one length, got lengths {lengths}. Keep the steps at which "
            "both rewards were measured."
        )
    if not all(math.isfinite(value) for column in columns for value in column):
        raise ValueError(f"`runs[{name!r}]` must be finite, got nan or infinity: leave out steps without a reward.")
