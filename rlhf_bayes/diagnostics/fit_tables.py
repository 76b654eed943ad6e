"""Shows fits, samples and training curves as tables and images."""

from collections.abc import Mapping, Sequence
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
    for name, quantity in shown_in("terminal").items():
        cells = [getattr(fit, name) for fit in fits.values()]
        # rows without a number for any distribution are left out, and some where all are 0
        if quantity.hidden_at_zero and all(cell is not None and cell.mean == 0 for cell in cells):
            continue
        table.add_row(quantity.title, *("–" if cell is None else str(cell) for cell in cells))
    return table


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


def plot_history(log_history: Sequence[Mapping[str, float]], log_z: Estimate | None, path: str | Path) -> None:
    """
    Curves of a training run as an image: reward, KL to the prior, ELBO and log Z, entropy.

    Args:
        log_history (`Sequence[Mapping[str, float]]`):
            `trainer.state.log_history`, with the keys of PPOTrainer. Panels without data stay empty.
        log_z (`Estimate`, *optional*):
            The best possible ELBO; drawn if it is trustworthy.
        path (`str` or `Path`):
            The file of the image; its suffix determines the format.
    """
    # Figure rather than pyplot, which would need a display and could change the caller's backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = {
        "reward": ("reward", "reward"),
        "posterior/kl_to_prior": ("KL to prior", "nats per sequence"),
        "posterior/elbo": ("ELBO", "nats per sequence"),
        "entropy": ("entropy", "nats per token"),
    }
    for axes, (key, (title, unit)) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), color="C0", label=title)
        if key == "posterior/elbo" and log_z is not None and log_z.trustworthy:
            low, high = log_z.mean - 2 * log_z.standard_error, log_z.mean + 2 * log_z.standard_error
            axes.axhline(log_z.mean, color="C1", linestyle="--", label="log Z ± 2 standard errors")
            axes.axhspan(low, high, color="C1", alpha=0.2, linewidth=0)
            if points:
                steps, elbos = zip(*points, strict=True)
                axes.fill_between(steps, elbos, log_z.mean, color="C0", alpha=0.1, label="gap = KL to posterior")
            axes.legend(loc="lower right", frameon=False)
        axes.set(title=title, ylabel=unit, xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
