"""Writes one self-contained page of HTML, without network or scripts. Whatever a model wrote is escaped."""

import base64
import io
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf_bayes.report.diversity_curves import diversity_over_training
from rlhf_bayes.report.figures import (
    diversity_figure,
    elbo_figure,
    moments_figure,
    reward_kl_figure,
    stack_panels,
    training_figure,
)
from rlhf_bayes.report.run import Run, read_runs
from rlhf_bayes.report.tables import (
    evaluation_table,
    samples_tables,
    settings_tables,
    summary_table,
    verdicts,
    what_if_tables,
)

PAGE = "index.html"
_DPI = 150
_NARROW = 640  # pixels: narrower screens have one panel beside another no more, and break the cells of tables


def write_report(folders: Sequence[str | Path], output_dir: str | Path) -> Path:
    """
    A report on one or several runs side by side: `index.html`, and each figure as a PNG beside it.

    Args:
        folders (`Sequence` of `str` or `Path`):
            Folders of runs, as in [`read_runs`].
        output_dir (`str` or `Path`):
            The folder to write to, which is made if it does not exist.

    Returns:
        `Path` of the page.

    Raises:
        FileNotFoundError or ValueError: as [`read_runs`] does. Nothing is written then.
    """
    runs = read_runs(folders)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    sections = [
        ("Verdict", verdicts(runs)),
        ("Summary", summary_table(runs)),
        ("How far from the posterior", evaluation_table(runs)),
        *_figures(runs, output_dir),
        ("What if β were another", what_if_tables(runs)),
        ("Samples", samples_tables(runs)),
        ("Settings", settings_tables(runs)),
    ]
    page = output_dir / PAGE
    names = ", ".join(run.name for run in runs)
    page.write_text(html_page(names, [(title, body) for title, body in sections if body]), encoding="utf-8")
    return page


def _figures(runs: Sequence[Run], output_dir: Path) -> list[tuple[str, str]]:
    """(title, HTML) of each figure that there is data for."""
    against_kl = reward_kl_figure(runs)
    laws = ""
    if against_kl is not None and against_kl[1]:
        laws = "<p>Fitted, with d = √KL: " + "; ".join(
            f"<b>{escape(name)}</b> R = {escape(str(law))}" for name, law in against_kl[1].items()
        )
        laws += " (Gao, Schulman &amp; Hilton 2023).</p>"
    figures = [
        (
            "ELBO under its ceiling",
            "elbo",
            elbo_figure(runs),
            "The ELBO is the expected evidence, E[r]/β for a reward, minus KL(π‖π0). It cannot exceed log Z; the gap "
            "is the distance to the posterior, KL(π‖π*). Nats can be compared only within one posterior.",
            "",
        ),
        (
            "Reward against the distance from the prior",
            "reward_kl",
            against_kl and against_kl[0],
            "Dots are the logging steps of a run, the diamond is its evaluation. The dark line is the posteriors, "
            "each with its β; crosses are the best of n. Hollow triangles are posteriors that these draws cannot "
            "measure: they lie to the right of the triangle and above it. A run to the right of the dark line has "
            "more KL than the posterior of the same reward: its inference is not finished.",
            laws,
        ),
        (
            "Over training",
            "training",
            training_figure(runs),
            "With many steps, the strong line is their running mean and the faint one the steps themselves.",
            "",
        ),
        (
            "Moments",
            "moments",
            moments_figure(runs),
            "Mean of each reward function or feature. The dashed line is the mean that was asked for.",
            "",
        ),
        (
            "Diversity",
            "diversity",
            diversity_figure(runs, diversity_over_training(runs)),
            "Computed from logged completions, the same number at each point. Distinct-2 that falls, or duplicates "
            "that rise, by more than the posterior asks for mean that the policy collapses.",
            "",
        ),
    ]
    return [
        (title, save_figure(figure, output_dir / f"{name}.png", title, caption) + extra)
        for title, name, figure, caption, extra in figures
        if figure is not None
    ]


def save_figure(figure: Any, path: Path, title: str, caption: str) -> str:
    """
    Write a figure as a PNG, and return it as HTML that holds the image.

    Args:
        figure (`matplotlib.figure.Figure`):
            The figure.
        path (`Path`):
            Of the PNG.
        title (`str`):
            What is read out in place of the image.
        caption (`str`):
            Text below the image.
    """
    figure.savefig(path, format="png", dpi=_DPI)
    width = round(figure.get_figwidth() * 100)
    stack_panels(figure)
    narrow = io.BytesIO()
    figure.savefig(narrow, format="png", dpi=_DPI)
    return embedded_image(path, title, caption, width, narrow.getvalue())


def embedded_image(path: Path, title: str, caption: str, width: int, narrow: bytes | None = None) -> str:
    """
    HTML that holds a PNG, with a caption.

    Args:
        path (`Path`):
            Of the PNG.
        title (`str`):
            What is read out in place of the image.
        caption (`str`):
            Text below the image.
        width (`int`):
            Largest width of the image, in pixels.
        narrow (`bytes`, *optional*):
            A PNG that is shown in its place on narrow screens.
    """
    other = ""
    if narrow is not None:
        other = f'<source media="(max-width: {_NARROW}px)" srcset="{_data_url(narrow)}">'
    return (
        f'<figure><picture>{other}<img alt="{escape(title)}" style="width:{width}px" '
        f'src="{_data_url(path.read_bytes())}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def html_page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """
    A page that needs no other file, with links to its sections at the top.

    Args:
        title (`str`):
            Its title, which is escaped.
        sections (`Sequence[tuple[str, str]]`):
            (title, HTML) of each section. The title is escaped, the HTML is not.
    """
    links = "".join(f'<a href="#s{index}">{escape(name)}</a>' for index, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{index}"><h2>{escape(name)}</h2>{content}</section>'
        for index, (name, content) in enumerate(sections)
    )
    made = f"rlhf_bayes {version('rlhf_bayes')}, {datetime.now().astimezone():%Y-%m-%d %H:%M}"
    # the Content-Security-Policy makes the browser load nothing and run no scripts
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="muted">{escape(made)}</p><nav>{links}</nav></header>
<main>{body}</main>
</body>
</html>
"""


_STYLE = """
:root { --ink: #1d2430; --muted: #667085; --line: #e3e7ee; --soft: #f6f7fa; --accent: #1f6feb; --bad: #b42318; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 28px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 15px; margin: 20px 0 6px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 10px; font-size: 14px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.muted, figcaption, .note { color: var(--muted); font-size: 13px; }
header p { margin: 2px 0 0; }
figure { margin: 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { max-width: 75ch; margin-top: 6px; }
/* a table that is wider than the screen has a shadow at the side where it goes on */
.scroll { overflow-x: auto; background: linear-gradient(90deg, #fff 30%, #fff0) 0 / 40px 100%,
  linear-gradient(270deg, #fff 30%, #fff0) 100% / 40px 100%,
  linear-gradient(90deg, #1d243033, #1d243000) 0 / 12px 100%,
  linear-gradient(270deg, #1d243033, #1d243000) 100% / 12px 100%; background-repeat: no-repeat;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; margin: 8px 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th, td { white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 400; }
abbr[title] { text-decoration: underline dotted var(--muted); text-underline-offset: 3px; cursor: help; }
dl { max-width: 75ch; font-size: 13px; }
dt { font-weight: 600; margin-top: 6px; }
dd { margin: 0; color: var(--muted); }
td.bad { color: var(--bad); }
table.texts { width: 100%; table-layout: fixed; }
table.claims { table-layout: auto; }
table.texts th, table.texts td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere;
  padding-right: 18px; }
table.texts th { white-space: normal; }
table.claims th, table.claims td { overflow-wrap: break-word; }
table.settings td { white-space: normal; overflow-wrap: anywhere; max-width: 40ch; }
table.texts p { margin: 0 0 8px; }
.score { color: var(--muted); font-size: 12px; display: block; }
td code { font-size: 13px; overflow-wrap: anywhere; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 640px) { header, main { padding: 0 14px; } table { font-size: 13px; }
  th, td { white-space: normal; padding: 5px 8px 5px 0; } tbody th { min-width: 9ch; } }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""
