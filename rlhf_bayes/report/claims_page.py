"""One page of HTML on claims that were tested by runs: figure, table, statements and a verdict computed from them."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, final

from rlhf_bayes.numerics.verdicts import AGREES, Measured, verdict, verdict_of_all
from rlhf_bayes.report.page import PAGE, embedded_image, html_page
from rlhf_bayes.report.tables import table

_MAX_ROWS = 40
_WIDTH = 960
_SUFFIX = ".claim.json"


@final
@dataclass(frozen=True)
class Statement:
    """A statement that a quantity lies between two bounds."""

    text: str
    """The statement in words, as the paper would make it."""
    mean: float
    standard_error: float
    """0 for an exact number."""
    freedom: float = math.inf
    """Degrees of freedom of the error."""
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""

    @property
    def verdict(self) -> str:
        """Computed from the number, its error and the bounds: see [`~rlhf_bayes.numerics.verdicts.verdict`]."""
        return verdict(Measured(self.mean, self.standard_error, self.freedom), self.low, self.high)

    @property
    def number(self) -> str:
        """The number with its error."""
        if math.isnan(self.mean):
            return "not known"
        if math.isnan(self.standard_error):
            error = " (one value)"
        else:
            exact = self.standard_error == 0 and math.isinf(self.freedom)
            error = "" if exact else f" ± {self.standard_error:.2g}"
        return f"{self.mean:.4g}{error} {self.unit}".strip().replace("-", "−")

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        if math.isinf(self.high):
            return f"above {self.low:.3g}".replace("-", "−")
        if math.isinf(self.low):
            return f"below {self.high:.3g}".replace("-", "−")
        return f"{self.low:.3g} to {self.high:.3g}".replace("-", "−")


@final
@dataclass(frozen=True)
class ClaimResult:
    """What the runs of one claim gave. Its figure and its table are `<name>.png` and `<name>.csv` beside it."""

    name: str
    title: str
    text: list[str]
    """Paragraphs: the claim with its place in the paper, and how it is tested."""
    statements: list[Statement]
    caption: str
    """Of the figure."""
    settings: dict[str, Any]
    seconds: float
    """CPU time of all runs, those of earlier calls included."""
    samples: dict[str, list[str]] = field(default_factory=dict)
    """Completions by the name of what drew them."""

    @property
    def verdict(self) -> str:
        """Disagrees if one statement does, agrees if all do."""
        return verdict_of_all(statement.verdict for statement in self.statements)

    def save(self, folder: Path, figure: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        """
        Write the result, its figure and its table into a folder.

        Args:
            folder (`Path`):
                The folder, which is made if it does not exist.
            figure (`matplotlib.figure.Figure`):
                The figure.
            rows (`Sequence[Mapping]`):
                Rows of the table, with the same columns.
        """
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{self.name}.png", format="png", dpi=150)
        with (folder / f"{self.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        # the result comes last, so that it never stands without its figure and its table
        (folder / f"{self.name}{_SUFFIX}").write_text(_as_json(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "ClaimResult":
        """Read what [`save`] wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        # JSON has neither infinity nor nan: an absent bound is infinite, an absent number not known
        numbers = [{name: value for name, value in row.items() if value is not None} for row in found["statements"]]
        unknown: dict[str, Any] = {"mean": math.nan, "standard_error": math.nan}
        return cls(**found | {"statements": [Statement(**unknown | row) for row in numbers]})


def write_claims_page(folder: str | Path) -> Path:
    """
    Write `index.html` on all results in a folder.

    Args:
        folder (`str` or `Path`):
            The folder into which [`ClaimResult.save`] wrote.

    Returns:
        `Path` of the page.

    Raises:
        FileNotFoundError: if it holds no result.
    """
    folder = Path(folder)
    results = [ClaimResult.read(path) for path in sorted(folder.glob(f"*{_SUFFIX}"))]
    if not results:
        raise FileNotFoundError(f"`folder` must hold results of claims, got {str(folder)!r} without any `*{_SUFFIX}`.")
    sections = [("Verdicts", _summary(results)), *((result.title, _section(result, folder)) for result in results)]
    page = folder / PAGE
    page.write_text(html_page("Claims of Korbak, Perez & Buckley 2022, tested", sections), encoding="utf-8")
    return page


def _as_json(content: dict[str, Any]) -> str:
    for row in content["statements"]:
        row |= {name: None for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _summary(results: Sequence[ClaimResult]) -> str:
    rows = [
        [
            result.title,
            result.verdict,
            f"{sum(statement.verdict == AGREES for statement in result.statements)} of {len(result.statements)}",
            "\n".join(
                f"{statement.text} ({statement.number}: {statement.verdict})"
                for statement in result.statements
                if statement.verdict != AGREES
            )
            or "–",
            f"{result.seconds:.0f}",
        ]
        for result in results
    ]
    note = (
        "Each verdict is computed: a statement agrees if the whole 95% interval of its number lies between its "
        "bounds, and disagrees if the whole interval lies outside. A claim disagrees if one of its statements does."
    )
    header = ["claim", "verdict", "statements that agree", "what does not agree", "CPU seconds"]
    return table(header, rows, kind="texts claims") + f'<p class="note">{escape(note)}</p>'


def _section(result: ClaimResult, folder: Path) -> str:
    rows = [[statement.text, statement.number, statement.bounds, statement.verdict] for statement in result.statements]
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    return (
        "".join(f"<p>{escape(paragraph)}</p>" for paragraph in result.text)
        + f"<p><b>Verdict: {escape(result.verdict)}.</b></p>"
        + table(["statement", "measured", "agrees if", "verdict"], rows, kind="texts claims")
        + embedded_image(folder / f"{result.name}.png", result.title, result.caption, _WIDTH)
        + _data(folder / f"{result.name}.csv")
        + _samples(result.samples)
        + f'<p class="note">{escape(settings)}</p>'
    )


def _data(path: Path) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    shown = [[_rounded(cell) for cell in row] for row in rows[:_MAX_ROWS]]
    rest = f", the first {_MAX_ROWS} of {len(rows)} rows" if len(rows) > _MAX_ROWS else ""
    return f"<details><summary>{escape(path.name)}{rest}</summary>{table(header, shown)}</details>"


def _samples(samples: Mapping[str, Sequence[str]]) -> str:
    if not samples:
        return ""
    depth = max(map(len, samples.values()))
    rows = [[texts[row] if row < len(texts) else "" for texts in samples.values()] for row in range(depth)]
    return f"<h3>Samples</h3>{table(list(samples), rows, kind='texts')}"


def _rounded(cell: str) -> str:
    try:
        return cell if cell.lstrip("-").isdigit() else f"{float(cell):.4g}"
    except ValueError:
        return cell
