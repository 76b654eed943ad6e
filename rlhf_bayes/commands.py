"""The console script `rlhf-bayes`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the arguments name; wrong input ends it with one line and status 2."""
    parser = argparse.ArgumentParser(
        prog="rlhf-bayes", description="Reinforcement learning with KL penalties as Bayesian inference."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    report = commands.add_parser(
        "report",
        help="one page of HTML, and PNGs, on one or several runs",
        description="Reads output folders of trainers and of `rlhf-bayes sample`, and writes a page for a browser.",
    )
    report.add_argument("folders", nargs="+", metavar="DIR", help="output folder of a run")
    report.add_argument("--output_dir", help="where to write. Default: `report` in the first DIR")
    args = parser.parse_args(arguments)
    try:
        _report(args.folders, args.output_dir)
    except (OSError, ValueError) as error:
        print(f"rlhf-bayes {args.command}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _report(folders: Sequence[str], output_dir: str | None) -> None:
    # the report alone: the package's trainers take seconds to import
    from .report import write_report

    console = Console()
    with console.status(f"Reading {len(folders)} folder{'s' * (len(folders) > 1)} and drawing the figures"):
        page = write_report(folders, output_dir or Path(folders[0]) / "report")
    console.print(f"Report in {page}.", highlight=False, markup=False)


if __name__ == "__main__":
    main()
