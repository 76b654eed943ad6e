"""Tables and images of distributional control: means of features against their targets, conditions, and curves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from rlhf_bayes.diagnostics.evaluate import Evaluation
from rlhf_bayes.diagnostics.fit_tables import estimates_of, fit_table
from rlhf_bayes.diagnostics.over_prompts import Estimate, explanation, over_prompts
from rlhf_bayes.diagnostics.scored_draws import ScoredDraws


def feature_means(draws: ScoredDraws) -> dict[str, Estimate]:
    """Mean over prompts of each feature that the evidence reports. That of a binary feature is a share."""
    found = {}
    for name, values in draws.features.items():
        values, n = values.double(), values.size(-1)
        share_of = n if bool(((values == 0) | (values == 1)).all()) else None
        found[name] = over_prompts(values.mean(-1), values.var(-1) / n, share_of=share_of)
    return found


def guarded_forward_kl(evaluation: Evaluation) -> Estimate | None:
    r"""
    KL(π*‖π′) for the policy π′ whose forbidden completions are rejected:

        π′ = π·1[allowed]/A,    KL(π*‖π′) = KL(π*‖π) + log A

    where A is the share of the policy's completions that are allowed. [`~rlhf_bayes.samplers.RejectionSampler`] with
    the policy as its proposal draws from π′, so all its completions meet the condition.

    Returns:
        `Estimate`: nats, mean over the prompts; None where there is no posterior, or where for some prompt no draw of
        the policy is allowed.

    Source: GUARD, Kim et al. 2024, arXiv 2410.06716.
    """
    shares = (evaluation.from_policy.log_likelihood > -torch.inf).double().mean(-1)  # (P,)
    forward_kl = evaluation.policy.forward_kl
    if forward_kl is None or bool((shares == 0).any()):
        return None
    gain = over_prompts(shares.log(), (1 - shares) / shares / evaluation.from_policy.log_prob.size(-1))
    mean = forward_kl.mean + gain.mean
    # assumes independence: the two are negatively correlated over prompts, so the error is rather too large
    errors = [
        (getattr(forward_kl, name) ** 2 + getattr(gain, name) ** 2) ** 0.5
        for name in ("standard_error", "draws_standard_error")
    ]
    half = ((forward_kl.high - forward_kl.mean) ** 2 + (gain.high - gain.mean) ** 2) ** 0.5
    return replace(
        forward_kl,
        mean=mean,
        standard_error=errors[0],
        low=mean - half,
        high=mean + half,
        draws_standard_error=errors[1],
    )


def control_table(evaluation: Evaluation, wanted: Mapping[str, float], title: str | None = None) -> Table:
    """
    A table of prior and policy: the means of the features, then the rows of [`fit_table`].

    Args:
        evaluation ([`Evaluation`]):
            The evaluation of a posterior whose evidence reports its features.
        wanted (`Mapping[str, float]`):
            Feature -> the mean asked for.
        title (`str`, *optional*):
            Title of the table.
    """
    fits = fit_table({"prior (before)": evaluation.prior, "policy (after)": evaluation.policy})
    table = Table(title=title)
    for column in fits.columns:
        table.add_column(column.header, justify=column.justify)
    means = [feature_means(draws) for draws in (evaluation.from_prior, evaluation.from_policy)]
    for name, moment in wanted.items():
        table.add_row(f"{escape(name)}, {moment:g} wanted", *(str(of[name]) for of in means))
    if evaluation.policy.forbidden.mean > 0:
        guarded = guarded_forward_kl(evaluation)
        table.add_row("KL from posterior, its forbidden draws rejected", "–", "–" if guarded is None else str(guarded))
    table.add_section()
    for label, *cells in zip(*(column.cells for column in fits.columns), strict=True):
        if set(cells) != {"–"}:  # evidence of features has no reward, so this row would be empty
            table.add_row(label, *cells)
    shares = [of[name] for of in means for name in wanted]
    table.caption = escape(explanation([*estimates_of(evaluation.prior), *estimates_of(evaluation.policy), *shares]))
    table.caption_justify = "left"
    return table


def plot_control(
    log_history: Sequence[Mapping[str, float]],
    wanted: Mapping[str, float],
    kl_to_prior: Estimate | None,
    path: str | Path,
) -> None:
    """
    Curves of a run of [`~rlhf_bayes.GDCTrainer`] as an image.

    Its panels are the moments, the divergences from the posterior, the KL to the prior, and the entropy.

    Args:
        log_history (`Sequence[Mapping[str, float]]`):
            `trainer.state.log_history`. Panels without data stay empty.
        wanted (`Mapping[str, float]`):
            Feature -> the mean asked for, drawn as a dashed line.
        kl_to_prior (`Estimate`, *optional*):
            KL(π*‖π0), at which the policy should end; drawn if it is trustworthy.
        path (`str` or `Path`):
            The file of the image; its suffix determines the format.
    """
    # Figure rather than pyplot, which would need a display and could change the caller's backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    moments, divergences, prior, entropy = figure.subplots(2, 2).flat

    def curve(axes, key: str, label: str, color: str) -> None:
        points = [
            (entry["step"], entry[key], entry.get(f"{key}_standard_error", 0.0))
            for entry in log_history
            if key in entry
        ]
        if points:
            steps, values, errors = map(torch.tensor, zip(*points, strict=True))
            axes.plot(steps, values, color=color, label=label)
            axes.fill_between(steps, values - 2 * errors, values + 2 * errors, color=color, alpha=0.2, linewidth=0)

    for index, (name, moment) in enumerate(wanted.items()):
        curve(moments, f"posterior/moments/{name}", name, f"C{index}")
        moments.axhline(moment, color=f"C{index}", linestyle="--", linewidth=1)
    curve(divergences, "posterior/forward_kl", "KL(π*‖π), nats", "C0")
    curve(divergences, "posterior/tv", "total variation", "C2")
    divergences.set_ylim(bottom=0)  # a divergence is not negative, even if its error bar is
    curve(prior, "posterior/kl_to_prior", "KL(π‖π0)", "C0")
    if kl_to_prior is not None and kl_to_prior.trustworthy:
        prior.axhline(kl_to_prior.mean, color="C1", linestyle="--", label="KL(π*‖π0)")
    curve(entropy, "entropy", "entropy", "C0")
    titles = {
        moments: ("means of the features, and those wanted", "share or mean"),
        divergences: ("divergence from the posterior ± 2 standard errors", "nats; TV in [0, 1]"),
        prior: ("KL to prior", "nats per sequence"),
        entropy: ("entropy", "nats per token"),
    }
    for axes, (title, unit) in titles.items():
        axes.set(title=title, ylabel=unit, xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not entropy and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
