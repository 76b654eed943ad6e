"""Makes the tables of a report, as HTML. Every cell is escaped."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from rlhf_bayes.diagnostics.quantities import meaning_of, title_of
from rlhf_bayes.report.figures import ceiling
from rlhf_bayes.report.run import Estimate, Run, Sample
from rlhf_bayes.samplers.draws import checks_in_words

MAX_PROMPTS = 12
MAX_SAMPLES = 2
_MAX_CHARACTERS = 1500


class Explained(NamedTuple):
    """The name of a row or column, with its meaning: shown where the mouse points, and listed below the table."""

    name: str
    meaning: str

    def __str__(self) -> str:
        return self.name


_LOGGED = {
    "reward": Explained("reward", "the mean reward of the completions that were drawn in training"),
    "posterior/kl_to_prior": Explained("KL to the prior (nats)", "KL(π‖π0): how far the policy went from the prior"),
    "posterior/elbo": Explained("ELBO (nats)", "E[r]/β − KL(π‖π0): what training maximises; at most log Z"),
    "entropy": Explained(
        "entropy (nats per token)", "of the policy at each token; the evaluation's is per completion"
    ),
    "completions/mean_length": Explained("length (tokens)", "the mean number of tokens of a completion"),
}
_BETA = Explained("β of the posterior", "the reward that a nat is worth: the posterior is π0·exp(r/β)/Z")
_STEPS = Explained("optimizer steps", "how often the weights were changed")
_CEILING = Explained(
    "log Z, the ELBO's ceiling (nats)",
    "log of E[exp(r/β)] under the prior, as the evaluation or a sampler estimated it: the best possible ELBO",
)
_GAP = Explained("log Z − ELBO = KL(π‖π*) (nats)", "the distance to the posterior; 0 is done")
_WHAT_IF = (
    Explained("β", "the reward that a nat is worth"),
    Explained("E[r]", "the mean reward under the posterior of this β: what training can reach"),
    Explained("KL(π*‖π0) (nats)", "how far this posterior is from the prior"),
    Explained("log Z (nats)", "the best possible ELBO at this β"),
    Explained(
        "lowest ESS", "how many of the draws count, for the prompt with the fewest; below 10 nothing is measured"
    ),
    Explained("k̂", "the tail of the weights; above 0.7 nothing is measured. – where it cannot be fitted"),
)
_NO_QUANTITIES = {"beta", "prompts", "num_draws", "gain"}  # the verdict tells the gain
# the settings in which runs differ most often; the others are folded away
_MAIN_SETTINGS = (
    "class", "model_name_or_path", "sampler", "beta", "learning_rate", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "num_iterations",
    "max_completion_length", "temperature", "critic", "target_kl", "missing_eos_penalty", "reward_weights",
    "lr_scheduler_type", "warmup_steps", "seed", "bf16",
)  # fmt: skip


_INTERVALS = (
    "[low, high] is a 95% interval: over prompts for a policy and its prior, over the draws for a sampler. ≥ and ≤ "
    "are bounds at 95%, for these prompts, where the draws allow no estimate."
)
_UNCONVERGED = "the chains disagree by more than chance: let them run longer, or start them elsewhere"


def table(header: Sequence[str | Explained], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """
    An HTML table. Texts are escaped; an [`Estimate`] that is not trustworthy shows why. Empty without rows.

    Args:
        header (`Sequence` of `str` or [`Explained`]):
            Names of the columns.
        rows (`Iterable`):
            Rows of cells, the first of which is the name of the row.
        kind (`str`):
            Class of the table, for the style.
    """
    rows = list(rows)
    lines = ["".join(_cell(cell, first=index == 0) for index, cell in enumerate(row)) for row in rows]
    if not lines:
        return ""
    head = "".join(f"<th>{_labelled(name)}</th>" for name in header)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    # columns of texts have a least width; on narrow screens the table scrolls
    style = f' style="min-width:{130 * len(header)}px"' if kind == "texts" else ""
    opening = f'<table class="{kind}"{style}>' if kind else "<table>"
    whole = f'<div class="scroll">{opening}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    explained = [cell for cell in (*header, *(row[0] for row in rows)) if isinstance(cell, Explained) and cell.meaning]
    if not explained:
        return whole
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in explained)
    return f"{whole}<details><summary>What these numbers are</summary><dl>{terms}</dl></details>"


def summary_table(runs: Sequence[Run]) -> str:
    """The logged metrics at the end of each training run, and the distance of the ELBO to its bound log Z."""
    runs, others = [run for run in runs if run.history], runs
    rows: list[list[Any]] = []
    if any(run.beta for run in runs):
        rows.append([_BETA, *(f"{run.beta:g}" if run.beta else "–" for run in runs)])
    if runs:
        rows.append([_STEPS, *(f"{_last_step(run):,}" for run in runs)])
    for key, label in _LOGGED.items():
        ends = [_end(run.curve(key)[1][0]) for run in runs]
        if any(end is not None for end in ends):
            rows.append([label, *("–" if end is None else f"{end:.2f}" for end in ends)])
    ceilings = [ceiling(run, others) for run in runs]
    if any(best is not None for best in ceilings):
        rows.append([_CEILING, *("–" if best is None else best for best in ceilings)])
        elbos = [_end(run.curve("posterior/elbo")[1][0]) for run in runs]
        gaps = [
            "–" if best is None or elbo is None else f"{best.value - elbo:.2f}"
            for best, elbo in zip(ceilings, elbos, strict=True)
        ]
        if set(gaps) != {"–"}:
            rows.append([_GAP, *gaps])
    note = '<p class="note">Logged figures are means over the last tenth of the steps, of training prompts.</p>'
    return table(["", *(run.name for run in runs)], rows) + note if rows else ""


def evaluation_table(runs: Sequence[Run]) -> str:
    """
    What each run's `evaluation.json` says of policy and prior.

    There is a column for each run and part of it, and a row for each quantity, with its interval or the reason why it
    cannot be trusted. Samplers report fewer quantities, so they have a table of their own.
    """
    sampled: dict[str, dict[str, Estimate]] = {}
    judged: dict[str, dict[str, Estimate]] = {}
    for run in runs:
        parts: dict[str, dict[str, Estimate]] = {}
        for path, estimate in run.estimates.items():
            part, _, name = path.rpartition("/")
            if name not in _NO_QUANTITIES:
                parts.setdefault(part, {})[name] = estimate
        for part, column in parts.items():
            # runs of the same seed drew the same completions from the prior, so only the first is shown
            if part == "prior" and any(_same_draws(column, other) for other in judged.values()):
                continue
            title = " ".join(filter(None, (run.name if len(runs) > 1 else "", part))) or run.name
            (judged if part else sampled)[title] = column
    tables = _quantities(sampled) + _drawn_table(runs) + _quantities(judged)
    note = f'<p class="note">{escape(_INTERVALS)}</p>' if tables else ""
    return tables + note


def verdicts(runs: Sequence[Run]) -> str:
    """What follows from the numbers of each run, in words."""
    return "".join(f"<p><b>{escape(run.name)}</b>: {escape(run.verdict)}</p>" for run in runs if run.verdict)


def what_if_tables(runs: Sequence[Run]) -> str:
    """For each sampled run, estimates of the posteriors of other β, from the same draws of the prior."""
    parts, shown = [], []
    for run in runs:
        if run.sampling.get("what_if") in shown:  # runs of the same seed have the same draws
            continue
        shown.append(run.sampling.get("what_if"))
        rows = [
            [
                f"{row['beta']:g}",
                *(
                    f"{row[key]:.2f} ± {row[f'{key}_standard_error']:.2f}"
                    if row["trustworthy"]
                    else _unreliable(row, key)
                    for key in ("reward", "kl_to_prior", "log_z")
                ),
                f"{row['importance_ess']:.0f}",
                "–" if row["khat"] is None else f"{row['khat']:.2f}".replace("-", "−"),
            ]
            for row in run.sampling.get("what_if", [])
        ]
        if rows:
            alike = [other.name for other in runs if other.sampling.get("what_if") == run.sampling["what_if"]]
            title = f"<h3>{escape(', '.join(alike))}</h3>" if len(runs) > 1 else ""
            parts.append(title + table(_WHAT_IF, rows))
    if not parts:
        return ""
    note = (
        "One set of draws from the prior, or of a store, reweighted, for these prompts. ± is a standard error. What "
        "is red cannot be measured with these draws, since too few of them count: ≥ is a bound at 95% that holds all "
        "the same. ESS is that of the worst prompt, k̂ that of all weights together."
    )
    return "".join(parts) + f'<p class="note">{note}</p>'


def samples_tables(runs: Sequence[Run]) -> str:
    """
    Completions of each run: a row for each prompt, a column for each run, and one for its prior where that is known.

    Draws are shown by their weights; a run without draws shows the last completions that it logged.
    """
    columns: list[tuple[str, dict[str, list[Sample]]]] = []
    shown: list[list[Sample]] = []
    for run in runs:
        if run.before and run.before not in shown:  # runs of the same seed have the same draws
            shown.append(run.before)
            columns.append(("prior" if len(runs) == 1 else f"prior of {run.name}", _by_prompt(run.before)))
        if run.samples:
            columns.append((run.name, _by_prompt(run.samples)))
    prompts = dict.fromkeys(prompt for _, of in columns for prompt in of)
    # prompts with completions of the most runs come first; sorted() keeps the order among equals
    chosen = sorted(prompts, key=lambda prompt: -sum(prompt in of for _, of in columns))[:MAX_PROMPTS]
    rows = [[prompt, *(_Texts(_drawn(of.get(prompt, []))) for _, of in columns)] for prompt in chosen]
    return table(["prompt", *(name for name, _ in columns)], rows, kind="texts")


def settings_tables(runs: Sequence[Run]) -> str:
    """A table of the main settings and of those in which runs differ; the others are folded away."""
    known = [run for run in runs if run.settings]
    names = list(dict.fromkeys(name for run in known for name in run.settings))
    main = [name for name in _MAIN_SETTINGS if name in names]
    differing = [
        name
        for name in names
        if name not in main and len({_shown(run, name) for run in known if name in run.settings}) > 1
    ]
    others = [name for name in names if name not in main and name not in differing]
    header = ["", *(run.name for run in known)]
    parts = [_settings(header, known, main + differing)]
    if others:
        parts.append(f"<details><summary>{len(others)} more</summary>{_settings(header, known, others)}</details>")
    return "".join(parts) if names else ""


def _quantities(columns: Mapping[str, Mapping[str, Estimate]]) -> str:
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [
        [Explained(title_of(name), meaning_of(name)), *(column.get(name, "–") for column in columns.values())]
        for name in names
    ]
    return table(["", *columns], rows)


def _drawn_table(runs: Sequence[Run]) -> str:
    """For each run of a sampler: its guarantee, and its own checks of its draws."""
    rows = []
    for run in runs:
        guarantee = run.settings.get("guarantee")
        if guarantee is not None:
            words = f"unconverged: {_UNCONVERGED}" if guarantee == "unconverged" else guarantee
            rows.append([run.name, words, checks_in_words(run.sampling.get("info", {})) or "–"])
    return table(["", "guarantee", "checks of the worst prompt"], rows)


def _same_draws(column: Mapping[str, Estimate], other: Mapping[str, Estimate]) -> bool:
    """Whether two columns come from the same completions: all quantities without log Z are then exactly equal."""
    names = ("reward", "entropy", "prior_perplexity")
    return all(column.get(name) == other.get(name) for name in names) and "entropy" in column


class _Texts(list):
    """The samples of one cell."""


def _cell(cell: Any, first: bool) -> str:
    if isinstance(cell, _Texts):
        return f"<td>{''.join(_paragraph(sample) for sample in cell) or '–'}</td>"
    if isinstance(cell, Estimate) and not cell.trustworthy:
        return f'<td class="bad" title="{escape(cell.reason)}">{escape(str(cell))}</td>'
    return f"<th>{_labelled(cell)}</th>" if first else f"<td>{escape(str(cell))}</td>"


def _labelled(name: Any) -> str:
    """The name of a row or column, with its meaning where the mouse points."""
    if isinstance(name, Explained) and name.meaning:
        return f'<abbr title="{escape(name.meaning)}">{escape(name.name)}</abbr>'
    return escape(str(name))


def _paragraph(sample: Sample) -> str:
    text = sample.completion.strip()
    cut = text[:_MAX_CHARACTERS] + (" …" if len(text) > _MAX_CHARACTERS else "")
    scores = ", ".join(f"{name} {value:.2f}" for name, value in sample.scores.items())
    return f"<p>{escape(cut)}" + (f'<span class="score">{escape(scores)}</span>' if scores else "") + "</p>"


def _by_prompt(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The completions of each prompt that were drawn last."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        of = found.setdefault(sample.prompt, [])
        step = math.inf if sample.step is None else sample.step
        last = math.inf if not of or of[0].step is None else of[0].step
        if of and last < step:
            of.clear()
        if not of or step >= last:
            of.append(sample)
    return found


def _drawn(samples: Sequence[Sample]) -> list[Sample]:
    """Up to `MAX_SAMPLES` samples, chosen in proportion to their weights, and the same ones each time."""
    left = [sample for sample in samples if sample.weight > 0]
    generator, drawn = random.Random(0), []
    if len({sample.weight for sample in left}) <= 1:
        return left[:MAX_SAMPLES]
    while left and len(drawn) < MAX_SAMPLES:
        (index,) = generator.choices(range(len(left)), [sample.weight for sample in left])
        drawn.append(left[index])
        left = [sample for sample in left if sample.completion != drawn[-1].completion]
    return drawn


def _settings(header: Sequence[str], runs: Sequence[Run], names: Sequence[str]) -> str:
    return table(header, [[name, *(_shown(run, name) for run in runs)] for name in names], kind="settings")


def _shown(run: Run, name: str) -> str:
    if name not in run.settings:
        return "–"
    value = run.settings[name]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unreliable(row: Mapping[str, Any], key: str) -> Estimate:
    tail = "" if row["khat"] is None else f", k̂ {row['khat']:.2f}"
    reason = f"importance ESS {row['importance_ess']:.1f}{tail}: draw more completions, or raise β"
    # files of earlier versions have no bounds
    return Estimate(row[key], trustworthy=False, reason=reason, at_least=row.get(f"{key}_at_least"))


def _end(values: Sequence[float]) -> float | None:
    last = values[-max(len(values) // 10, 1) :]
    return sum(last) / len(last) if last else None


def _last_step(run: Run) -> int:
    return int(max((entry.get("step", 0) for entry in run.history), default=0))
