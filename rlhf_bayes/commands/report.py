"""`rlhf-bayes report`: a page on one or several runs."""

import argparse
from pathlib import Path

from rich.console import Console

from rlhf_bayes.report import write_report


def run(args: argparse.Namespace) -> None:
    """Write the page, for parsed arguments."""
    console = Console()
    with console.status(f"Reading {len(args.folders)} folder(s) and drawing the figures"):
        page = write_report(args.folders, args.output_dir or Path(args.folders[0]) / "report")
    console.print(f"Report in {page}.", highlight=False, markup=False)
