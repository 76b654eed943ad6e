"""`rlhf-bayes report`: a page on one or several runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rlhf_bayes.report import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments after `rlhf-bayes report`, and write the page."""
    parser = argparse.ArgumentParser(
        prog="rlhf-bayes report",
        description="Reads output folders of trainers and of `rlhf-bayes sample`, and writes a page for a browser.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folder of a run")
    parser.add_argument("--output_dir", help="where to write. Default: `report` in the first DIR")
    args = parser.parse_args(arguments)
    console = Console()
    with console.status(f"Reading {len(args.folders)} folder(s) and drawing the figures"):
        page = write_report(args.folders, args.output_dir or Path(args.folders[0]) / "report")
    console.print(f"Report in {page}.", highlight=False, markup=False)
