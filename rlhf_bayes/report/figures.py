"""The figures of a report: learning curves under log Z, reward against √KL, moments, diversity."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_bayes.numerics import RewardLaw, fit_reward_law
from rlhf_bayes.report.run import Estimate, Run

_PANEL = (5.2, 3.1)
_MOMENT = "posterior/moments/"
_OF_THE_PRIOR = ("what_if", "best_of_n")


def ceiling(run: Run, runs: Sequence[Run]) -> Estimate | None:
    """
    An estimate of log Z for a run, or None where none can be trusted.

    It comes from the run's own evaluation, the one after training or the last one during it; otherwise from a sampler
    that another of the runs ran on the same rewards at the same β.
    """
    for name, estimate in run.estimates.items():
        if name.rpartition("/")[2] == "log_z" and estimate.trustworthy:
            return estimate
    _, (values, errors) = run.curve("eval_posterior_fit/log_z", "eval_posterior_fit/log_z_standard_error")
    if values:  # the callback logs only estimates that can be trusted
        return _with_error(values[-1], errors[-1])
    for other in (run, *runs):
        # evidence of another reward, or at another β, makes another posterior
        if run.beta is None or other.reward_names != run.reward_names:
            continue
        for row in other.sampling.get("what_if", []):
            if row.get("trustworthy") and math.isclose(row["beta"], run.beta, rel_tol=1e-6):
                return _with_error(row["log_z"], row["log_z_standard_error"], f"prompts of {other.name}")
    return None


def elbo_figure(runs: Sequence[Run]) -> Any | None:
    """ELBO over training, below log Z where that is known: the gap is KL(π‖π*). None without data."""
    drawn = [run for run in runs if run.curve("posterior/elbo")[0]]
    if not drawn:
        return None
    # nats of different posteriors cannot be compared, so runs with other rewards or another β get a panel of their own
    figure, panels = panels_of(len(drawn))
    for axes, run in zip(panels, drawn, strict=True):
        color = _color(runs, run.name)
        steps, (elbo,) = run.curve("posterior/elbo")
        smooth = _draw_curve(axes, steps, elbo, color, "ELBO")
        best = ceiling(run, runs)
        if best is not None:
            label = f"log Z = {best.value:.2f} nats" + (f" ({best.reason})" if best.reason else "")
            if run.beta is not None:
                label += f": J ≤ β·log Z = {run.beta * best.value:.2f}"
            axes.axhline(best.value, color="0.25", linestyle="--", linewidth=1.2, label=label)
            if best.low is not None and best.high is not None:
                axes.axhspan(best.low, best.high, color="0.25", alpha=0.12, linewidth=0)
            axes.fill_between(steps, smooth, best.value, color=color, alpha=0.12, label="gap = KL(π‖π*)")
        else:
            _, (log_z,) = run.curve("posterior/log_z")
            if len(log_z) == len(steps):
                _draw_curve(axes, steps, log_z, "0.4", "log Z, each batch alone: too low", linestyle=":")
        axes.set(title=run.name, xlabel="optimizer step", ylabel="nats per sequence")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, fontsize=7.5)
    return figure


def training_figure(runs: Sequence[Run]) -> Any | None:
    """Reward, KL to the prior, entropy and length over training, all runs in each panel. None without data."""
    keys = {
        "reward": ("reward", "units of reward"),
        "posterior/kl_to_prior": ("KL to the prior", "nats per sequence"),
        "posterior/forward_kl": ("KL from the posterior, KL(π*‖π)", "nats per sequence"),
        "entropy": ("entropy", "nats per token"),
        "completions/mean_length": ("length of completions", "tokens"),
    }
    shown = {key: labels for key, labels in keys.items() if any(run.curve(key)[0] for run in runs)}
    return _curves_figure(runs, shown)


def moments_figure(runs: Sequence[Run]) -> Any | None:
    """The mean of each reward or feature over training, with its target dashed. None without data."""
    logged = {key for run in runs for entry in run.history for key in entry if _is_moment(key)}
    names = sorted(key for key in logged if any(run.curve(key)[0] for run in runs))
    shown = {key: (key.removeprefix("rewards/").removesuffix("/mean").removeprefix(_MOMENT), "mean") for key in names}
    # a single reward is already shown in the panel `reward` of the learning curves
    if len(shown) == 1 and not names[0].startswith(_MOMENT):
        return None
    figure = _curves_figure(runs, shown)
    for axes, (title, _) in zip(figure.axes if figure else (), shown.values(), strict=False):
        for run in runs:
            if title in run.sampling.get("moments", {}):
                axes.axhline(run.sampling["moments"][title], color=_color(runs, run.name), linestyle="--", linewidth=1)
    return figure


def diversity_figure(
    runs: Sequence[Run], measures: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
) -> Any | None:
    """Diversity over training, from measure -> run -> (steps, values). None where no run has two steps."""
    kept = {name: of for name, of in measures.items() if any(len(steps) > 1 for steps, _ in of.values())}
    if not kept:
        return None
    figure, panels = panels_of(len(kept))
    for axes, (measure, of) in zip(panels, kept.items(), strict=True):
        for name, (steps, values) in of.items():
            axes.plot(steps, values, color=_color(runs, name), marker=".", label=name)
        axes.set(title=measure, xlabel="optimizer step")
    _legend(figure, panels, len(runs))
    return figure


def reward_kl_figure(runs: Sequence[Run]) -> tuple[Any, dict[str, RewardLaw]] | None:
    """
    A figure of reward against √KL(policy‖prior), and the laws fitted in it, by name. None without data.

    It shows runs, the best of n, the posteriors of all β (no policy lies above them), and the laws of Gao et al. 2023
    fitted to runs and to the best of n.
    """
    points = {run.name: _root_kl_and_reward(run) for run in runs}
    trained = [run for run in runs if points[run.name][0]]
    judged = [run for run in runs if {"policy/reward", "policy/kl_to_prior"} <= run.estimates.keys()]
    sampled: list[Run] = []
    for run in runs:
        curves = [run.sampling.get(name) for name in _OF_THE_PRIOR]
        # runs of the same seed drew the same completions from the prior, so only the first is shown
        if any(curves) and curves not in [[other.sampling.get(name) for name in _OF_THE_PRIOR] for other in sampled]:
            sampled.append(run)
    if not trained and not judged and not sampled:
        return None
    figure, (axes,) = panels_of(1, size=(7.4, 4.6))
    laws = {}
    for run in trained:
        d, reward = points[run.name]
        axes.plot(
            d, reward, ".", color=_color(runs, run.name), alpha=0.35, markersize=4, label=f"{run.name}, logging steps"
        )
        _draw_law(axes, d, reward, "rl", _color(runs, run.name), run.name, laws, _reward_of_the_prior(run))
    for run in judged:
        reward, kl = (run.estimates[f"policy/{name}"].value for name in ("reward", "kl_to_prior"))
        axes.plot(
            math.sqrt(max(kl, 0.0)), reward, "D", color=_color(runs, run.name), markersize=8, markeredgecolor="white",
            zorder=4, label=f"{run.name}, evaluated",
        )  # fmt: skip
    for index, run in enumerate(sampled):
        suffix = "" if len(sampled) == 1 else f", {run.name}"
        # the posteriors of the same rewards lie close together, so only the first run's are labelled
        named = all(other.reward_names != run.reward_names for other in sampled[:index])
        _draw_sampled(axes, run, suffix, laws, named)
    axes.set(xlabel="√KL(policy‖prior)  (√nats)", ylabel="reward")
    axes.set_xlim(left=0)
    _legend(figure, [axes], 2)
    return figure, laws


def _color(runs: Sequence[Run], name: str) -> str:
    """The colour of a run, which is the same in all figures."""
    return f"C{[run.name for run in runs].index(name) % 10}"


def _with_error(value: float, error: float, reason: str = "") -> Estimate:
    return Estimate(value, value - 1.96 * error, value + 1.96 * error, reason=reason)


def _reward_of_the_prior(run: Run) -> float | None:
    known = run.estimates.get("prior/reward")
    return None if known is None else known.value


def _draw_sampled(axes: Any, run: Run, suffix: str, laws: dict[str, RewardLaw], named: bool) -> None:
    rows = sorted(run.sampling.get("what_if", []), key=lambda row: -row["beta"])
    posterior = [row for row in rows if row.get("trustworthy")]
    if posterior:
        posterior = sorted(posterior, key=lambda row: row["kl_to_prior"])
        d = [math.sqrt(max(row["kl_to_prior"], 0.0)) for row in posterior]
        reward = [row["reward"] for row in posterior]
        axes.plot(d, reward, color="0.15", linewidth=1.4, marker="o", markersize=4, label=f"posteriors of β{suffix}")
        # smaller β go on, but these draws give no more than bounds: a posterior is to the right of its point and above
        beyond = [row for row in rows if row["beta"] < min(kept["beta"] for kept in posterior)]
        bounds = [(row.get("kl_to_prior_at_least"), row.get("reward_at_least"), row["beta"]) for row in beyond]
        bounds = [(math.sqrt(max(kl, 0.0)), least, beta) for kl, least, beta in bounds if None not in (kl, least)]
        if bounds:
            x, y, betas = (list(column) for column in zip(*bounds, strict=True))
            axes.plot(
                [d[-1], *x], [reward[-1], *y], color="0.15", linewidth=1, linestyle=":", marker=">",
                markevery=slice(1, None), markerfacecolor="white", label=f"at least, β too small to measure{suffix}",
            )  # fmt: skip
            if named:
                text = f"β {betas[0]:g}" + (f" to {betas[-1]:g}" if len(betas) > 1 else "") + ": at least"
                axes.annotate(text, (x[-1], y[-1]), xytext=(6, -10), textcoords="offset points", fontsize=7)
        for x, y, row in zip(d, reward, posterior if named else [], strict=named):
            axes.annotate(
                f"β {row['beta']:g}", (x, y), xytext=(-3, 5), textcoords="offset points", fontsize=7, ha="right"
            )
    best = run.sampling.get("best_of_n", [])
    if best:
        d, reward = [math.sqrt(row["kl_to_prior"]) for row in best], [row["reward"] for row in best]
        axes.plot(d, reward, "x", color="0.45", markersize=6, label=f"best of n{suffix}")
        _draw_law(axes, d, reward, "best_of_n", "0.45", f"best of n{suffix}", laws)


def _draw_law(
    axes: Any,
    d: Sequence[float],
    reward: Sequence[float],
    form: Any,
    color: str,
    name: str,
    laws: dict[str, RewardLaw],
    start: float | None = None,
) -> None:
    # a run's reward is the one that is maximised, so no downturn may be read into it
    law = fit_reward_law(d, reward, form, start, never_falls=True)
    if law is None:
        return
    laws[name] = law
    # where the prior's reward was fitted too, the line does not extend to it
    grid = np.linspace(min(d) if start is None else 0.0, max(d), 100)
    style = "-" if form == "rl" else "--"
    axes.plot(
        grid, [law(float(x)) for x in grid], color=color, linestyle=style, linewidth=1.8, label=f"{name}, fitted"
    )


def _root_kl_and_reward(run: Run) -> tuple[list[float], list[float]]:
    _, (kl, reward) = run.curve("posterior/kl_to_prior", "reward")
    # an estimate of KL by log-ratios may be slightly negative
    return [math.sqrt(max(value, 0.0)) for value in kl], reward


def _curves_figure(runs: Sequence[Run], shown: Mapping[str, tuple[str, str]]) -> Any | None:
    if not shown:
        return None
    figure, panels = panels_of(len(shown))
    for axes, (key, (title, unit)) in zip(panels, shown.items(), strict=True):
        for run in runs:
            steps, (values,) = run.curve(key)
            if steps:
                _draw_curve(axes, steps, values, _color(runs, run.name), run.name)
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
    _legend(figure, panels, len(runs))
    return figure


def _draw_curve(
    axes: Any, steps: Sequence[float], values: Sequence[float], color: str, label: str, linestyle: str = "-"
) -> list[float]:
    """Draw the values faintly and their running mean strongly; returns the running mean."""
    width = len(values) // 40
    smooth = [float(np.mean(values[max(0, i - width) : i + width + 1])) for i in range(len(values))]
    if width > 0:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
    marker = "." if len(values) < 3 else None
    axes.plot(steps, smooth, color=color, linestyle=linestyle, linewidth=1.6, marker=marker, label=label)
    return smooth


def panels_of(number: int, size: tuple[float, float] = _PANEL) -> tuple[Any, list[Any]]:
    """A figure with so many panels, two side by side, each of a size in inches; returns it with their axes."""
    # Figure rather than pyplot, which would need a display and could change the caller's backend
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(number, 2)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout=ConstrainedLayoutEngine(h_pad=0.12))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.title.set_fontsize(10)
    for axes in panels[number:]:
        axes.set_visible(False)
    return figure, panels[:number]


def stack_panels(figure: Any) -> None:
    """Put the panels of a figure one below the other, for narrow screens."""
    from matplotlib.gridspec import GridSpec

    panels = [axes for axes in figure.axes if axes.get_visible()]
    grid = GridSpec(len(panels), 1, figure=figure)
    height = figure.get_figheight() / figure.axes[0].get_gridspec().nrows
    for index, axes in enumerate(panels):
        axes.set_subplotspec(grid[index])
    for axes in figure.axes:
        if axes not in panels:
            axes.remove()
    for legend in figure.legends:
        legend.set_ncols(min(2, len(legend.get_texts())))
    figure.set_size_inches(_PANEL[0], height * len(panels))


def _legend(figure: Any, panels: Sequence[Any], columns: int) -> None:
    """Draw one legend for all panels, since a run may be missing in some of them."""
    named = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if len(named) > 1:
        figure.legend(
            list(named.values()), list(named), loc="outside lower center", ncols=min(columns, 4), frameon=False,
            fontsize=8,
        )  # fmt: skip


def _is_moment(key: str) -> bool:
    return (key.startswith("rewards/") and key.endswith("/mean")) or key.startswith(_MOMENT)
