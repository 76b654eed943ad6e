"""Shows fits, samples and training curves as tables and images."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from rlhf_bayes.diagnostics.estimates import PosteriorFit
from rlhf_bayes.diagnostics.over_prompts import Estimate, explanation
from rlhf_bayes.diagnostics.quantities import shown_in
from rlhf_bayes.diagnostics.scored_draws import ScoredDraws


def fit_table(fits: Mapping[str, PosteriorFit], title: str | None = None) -> Table:
    """A table with a column for each distribution and a row for each quantity. Its caption says what ± is."""
    shown = [estimate for fit in fits.values() for estimate in estimates_of(fit)]
    table = Table(title=title, caption=escape(explanation(shown)), caption_justify="left")
    table.add_column("")
    for name in fits:
        table.add_column(name, justify="right")
    for row in fit_rows(fits):
        table.add_row(*row)
    return table


def fit_rows(fits: Mapping[str, PosteriorFit]) -> list[list[str]]:
    """The rows of [`fit_table`]: a quantity, and its estimate for each distribution. Some are left out at 0."""
    rows = []
    for name, quantity in shown_in("terminal").items():
        cells = [getattr(fit, name) for fit in fits.values()]
        if quantity.hidden_at_zero and all(cell is not None and cell.mean == 0 for cell in cells):
            continue
        rows.append([quantity.title, *("–" if cell is None else str(cell) for cell in cells)])
    return rows


def estimates_of(fit: PosteriorFit) -> list[Estimate]:
    """The estimates of a fit that the terminal's table shows."""
    found = [getattr(fit, name) for name in shown_in("terminal")]
    return [estimate for estimate in found if estimate is not None]


def samples_table(prompts: Sequence[Any], draws: Mapping[str, ScoredDraws], title: str | None = None) -> Table:
    """A table with a row for each prompt and a column for each set of draws, which shows the first completions."""
    table = Table("prompt", *draws, title=title, show_lines=True)
    for row, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        table.add_row(*(escape(cell) for cell in (text, *(drawn.texts[row][0] for drawn in draws.values()))))
    return table


@dataclass(frozen=True)
class _Panel:
    """One panel of the curves of a training."""

    title: str
    unit: str
    value: Callable[[Mapping[str, float]], float]
    """Of an entry of the log; KeyError where it holds none."""
    target: str | None = None
    """The field of [`PosteriorFit`] that holds the value of the posterior."""


_PANELS = (
    _Panel("reward", "reward", lambda entry: entry["reward"], "posterior_reward"),
    _Panel(
        "KL to the prior", "nats per sequence", lambda entry: entry["posterior/kl_to_prior"], "posterior_kl_to_prior"
    ),
    _Panel("ELBO", "nats per sequence", lambda entry: entry["posterior/elbo"], "log_z"),
    # the log has the mean over tokens
    _Panel("entropy", "nats per sequence", lambda entry: entry["entropy"] * entry["completions/mean_length"]),
)


def plot_history(log_history: Sequence[Mapping[str, float]], fit: PosteriorFit | None, path: str | Path) -> None:
    """
    Curves of a training run as an image: reward, KL to the prior, ELBO, and entropy, with their values under π*.

    A faint line is what was logged, the strong one its moving average. Each title says where the training ended.

    Args:
        log_history (`Sequence[Mapping[str, float]]`):
            `trainer.state.log_history`, with the keys of PPOTrainer. Panels without data stay empty.
        fit ([`PosteriorFit`], *optional*):
            The trained policy's, whose values of the posterior are drawn where they are trustworthy.
        path (`str` or `Path`):
            The file of the image; its suffix determines the format.
    """
    # Figure rather than pyplot, which would need a display and could change the caller's backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        steps, values = _points(log_history, panel)
        target = getattr(fit, panel.target) if fit is not None and panel.target is not None else None
        target = target if target is not None and target.trustworthy else None
        end = f", at the end {_ended(values):.3g}" if values else ""
        if values:
            axes.plot(steps, values, color="C0", alpha=0.25, linewidth=1)
            axes.plot(steps, _moving_average(values), color="C0", label=f"{panel.title}, moving average")
        if target is not None:
            of_it = "log Z" if panel.target == "log_z" else "posterior"
            low, high = target.mean - 2 * target.standard_error, target.mean + 2 * target.standard_error
            axes.axhline(target.mean, color="C1", linestyle="--", label=f"{of_it} ± 2 standard errors")
            axes.axhspan(low, high, color="C1", alpha=0.2, linewidth=0)
            end += f"; {of_it} {target.mean:.3g}"
            if values and panel.target == "log_z":
                averages = _moving_average(values)
                axes.fill_between(steps, averages, target.mean, color="C0", alpha=0.1, label="gap = KL to posterior")
        axes.set(title=f"{panel.title}{end}", ylabel=panel.unit, xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _points(log_history: Sequence[Mapping[str, float]], panel: _Panel) -> tuple[list[float], list[float]]:
    steps, values = [], []
    for entry in log_history:
        try:
            value = panel.value(entry)
        except KeyError:
            continue
        steps.append(entry["step"])
        values.append(value)
    return steps, values


def _moving_average(values: Sequence[float]) -> list[float]:
    """Means over a window around each value, a tenth of them wide and narrower at the ends."""
    reach = len(values) // 20
    windows = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [statistics.fmean(window) for window in windows]


def _ended(values: Sequence[float]) -> float:
    """The mean of the last tenth."""
    return statistics.fmean(values[-max(1, len(values) // 10) :])
