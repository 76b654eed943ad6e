"""Runs the script of a claim in this process, as a user does: a process of its own is mostly imports."""

import csv
from pathlib import Path

import pytest

from rlhf_bayes import commands
from rlhf_bayes.report.claims_page import ClaimResult

SCRIPTS = Path(__file__).parents[3] / "recipes" / "claims"


@pytest.fixture
def run_claim(tmp_path, monkeypatch):
    """Runs a claim with flags; returns its result and the rows of its table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(name, *flags):
        commands.main(["claims", name, "--output_dir", "out", *map(str, flags)])
        out = tmp_path / "out"
        assert (out / f"{name}.png").stat().st_size > 1000
        assert "<h2>" in (out / "index.html").read_text()
        result = ClaimResult.read(out / f"{name}.claim.json")
        assert result.statements
        with (out / f"{name}.csv").open(newline="") as file:
            return result, list(csv.DictReader(file))

    return run
