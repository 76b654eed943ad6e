"""The notebooks run from top to bottom, and are notebooks to jupytext."""

import runpy
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples" / "notebooks").glob("*.py"))

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(script):
    runpy.run_path(str(script))  # each ends with an assertion on what it found


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_jupytext_reads_it_as_a_notebook(script):
    jupytext = pytest.importorskip("jupytext", reason="notebooks need the extra `docs`")
    cells = jupytext.read(script).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert {cell.cell_type for cell in cells} == {"markdown", "code"}
