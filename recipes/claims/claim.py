"""What the scripts of claims have in common: flags, results that are kept, statements, and the files they write.

A script measures in cells: functions from settings to plain numbers. Each cell's result is a JSON file in
`<output_dir>/cells`, named by its settings, so that a script that was stopped goes on with the next cell, and two
claims that need the same run share it.
"""

import argparse
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.console import Console

from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.numerics.verdicts import Measured, measured
from rlhf_bayes.report.claims_page import ClaimResult, Statement, write_claims_page
from rlhf_bayes.report.figures import panels_of as panels  # noqa: F401 (the scripts draw with it)

# flags of a run with another model than the bundled one, and their defaults for the bundled one
REAL = {
    "model_name_or_path": (None, "The prior: a folder or a name on the hub. Default: the bundled model."),
    "dataset_name": (None, "Prompts, as in the other recipes: a name on the hub, a file or a folder."),
    "prompt_column": ("prompt", "Column that holds the prompts."),
    "max_prompts": (8, "Number of prompts, the first ones of the bundled model, chosen at random otherwise."),
    "max_completion_length": (24, "Tokens, EOS included."),
    "learning_rate": (1e-3, "Of all methods."),
    "max_grad_norm": (1.0, "Gradients are scaled down to this norm, for all methods."),
    "batch": (32, "Completions in an optimizer step."),
    "draws": (32, "Completions that a policy draws for each prompt when it is measured."),
}


class Claim:
    """
    One claim while it is tested. Its title and its text are the docstring of its script.

    Args:
        script (`str`): `__file__` of the script.
        doc (`str`): `__doc__` of the script: a title, then paragraphs. Indented ones, the commands, are not shown.
        trains (`bool`): whether it has flags for another model, prompts and training.
        **defaults: flags of the script, with their defaults; a float makes a float flag, and so on.
    """

    def __init__(self, script: str, doc: str, trains: bool, **defaults: Any):
        quiet()
        self.name = Path(script).stem
        first, *paragraphs = doc.strip().split("\n\n")
        self.title = " ".join(first.split()).rstrip(".")
        self.text = [" ".join(part.split()) for part in paragraphs if not part.startswith("    ")]
        self.args = parse_flags(self.name, self.title, trains, defaults)
        self.folder = Path(self.args.output_dir)
        self.statements: list[Statement] = []
        self.seconds, self.cells = 0.0, 0
        self.console = Console(highlight=False, emoji=False)
        self.console.print(f"[bold]{self.name}[/]: {self.title}")

    def cell(self, function: Callable[..., Any], **settings: Any) -> Any:
        """
        The result of `function(**settings)`, which is read from its file if there is one, and computed if not.

        The file is named by the settings and the source of the function, so a changed function is run again. A change
        in what the function calls is not seen: remove the folder `cells`, or name another `--output_dir`.
        """
        text = json.dumps([inspect.getsource(function), settings], sort_keys=True)
        key = f"{function.__name__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        file, started = self.folder / "cells" / f"{key}.json", time.process_time()
        self.cells += 1
        kept = file.is_file()
        if not kept:
            result = function(**settings)
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {"settings": settings, "seconds": time.process_time() - started, "result": result}
            part = file.with_suffix(".part")
            part.write_text(json.dumps(content), encoding="utf-8")
            part.replace(file)  # a script that is stopped leaves no half of a file
        content = json.loads(file.read_text(encoding="utf-8"))
        self.seconds += content["seconds"]
        told = {name: str(value) for name, value in settings.items() if name not in REAL and name != "model"}
        what = ", ".join(f"{name} {shorten(value, 40, placeholder='…')}" for name, value in told.items())
        took = "kept" if kept else f"{content['seconds']:.1f} s"
        self.console.print(f"  {self.cells}: {function.__name__} {what}: {took}")
        return content["result"]

    def runs(
        self, function: Callable[..., Any], variants: Mapping[str, Mapping[str, Any]], **common: Any
    ) -> dict[str, list[Any]]:
        """Name -> the results of `function` for all seeds, with the settings of that name and those in common."""
        return {
            name: [self.cell(function, seed=seed, **settings, **common) for seed in self.seeds]
            for name, settings in variants.items()
        }

    @property
    def seeds(self) -> range:
        """The seeds of everything that is random."""
        return range(self.args.seeds)

    @property
    def model(self) -> dict[str, Any]:
        """Settings of the prior, the prompts and the training, for cells."""
        return {name: getattr(self.args, name) for name in REAL}

    def state(
        self,
        text: str,
        values: Sequence[float] | Measured | float,
        low: float | None = None,
        high: float | None = None,
        unit: str = "",
    ) -> Statement:
        """
        Add a statement: a number lies between `low` and `high`.

        Args:
            text (`str`): the statement, as the paper would make it.
            values: one number for each seed; or a mean with its error; or one exact number.
            low, high (`float`, *optional*): bounds of the number.
            unit (`str`): of the number.
        """
        if isinstance(values, Measured):
            number = values
        else:
            number = Measured(float(values), 0.0) if isinstance(values, int | float) else measured(list(values))
        bounds = {name: bound for name, bound in (("low", low), ("high", high)) if bound is not None}
        statement = Statement(text, *number, **bounds, unit=unit)
        self.statements.append(statement)
        return statement

    def write(
        self, figure: Any, rows: list[dict[str, Any]], caption: str, samples: dict[str, list[str]] | None = None
    ) -> None:
        """Write the figure, the table, the verdict and the page on all claims of the folder, and print the verdict."""
        settings = {
            name: value for name, value in vars(self.args).items() if name != "output_dir" and value is not None
        }
        result = ClaimResult(
            self.name, self.title, self.text, self.statements, caption, settings, self.seconds, samples or {}
        )
        result.save(self.folder, figure, rows)
        page = write_claims_page(self.folder)
        for statement in result.statements:
            line = f"  {statement.verdict:<12} {statement.text}: {statement.number} ({statement.bounds})"
            self.console.print(line, markup=False, soft_wrap=True)
        self.console.print(f"  [bold]{result.verdict}[/], {self.seconds:.0f} s of CPU. Page: {page}", soft_wrap=True)


def parse_flags(name: str, title: str, trains: bool, defaults: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=name, description=title, allow_abbrev=False)
    parser.add_argument("--output_dir", default="runs/claims", help="Where results, figures and the page are written.")
    flags = {flag: (value, "") for flag, value in defaults.items()}
    if trains:
        flags = REAL | {flag: (value, REAL.get(flag, ("", ""))[1]) for flag, (value, _) in flags.items()}
    for flag, (value, text) in flags.items():
        kind = str if value is None else type(value)
        parser.add_argument(f"--{flag}", type=kind, default=value, help=f"{text} Default: {value}.".strip())
    args, unknown = parser.parse_known_args()
    if unknown:
        exact = not trains and any(word.lstrip("-").partition("=")[0] in REAL for word in unknown)
        why = (
            ": this claim is computed on a model whose completions are enumerated, and has no real run"
            if exact
            else ""
        )
        parser.error(f"unrecognized arguments {' '.join(unknown)}{why}")
    if trains and (args.model_name_or_path is None) != (args.dataset_name is None):
        parser.error("`--model_name_or_path` and `--dataset_name` must be given together: prompts fit a model.")
    return args
