"""README, pages of docs/ and layout stay true: every file is named, links lead somewhere, the Python runs."""

import re
from pathlib import Path

import pytest

from .scripts import loaded_script

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


def python_of(*names: str) -> dict:
    """What the Python of some pages defines, run one after the other, as a reader would."""
    scope = {}
    for name in names:
        for block in re.findall(r"^```python\n(.*?)^```", PAGES[name], flags=re.MULTILINE | re.DOTALL):
            exec(block, scope)
    return scope


def test_the_layout_is_that_of_the_files():
    with loaded_script(ROOT / "docs" / "layout.py") as script:
        written = PAGES["layout.md"]
        assert written == script.layout(), "write it anew: python docs/layout.py"
        silent = [line for line in written.splitlines() if line.lstrip().startswith("- ") and ": " not in line]
    assert silent == [], "begin these modules with a docstring"


def test_pages_on_metrics_and_fields_are_those_of_the_records():
    with loaded_script(ROOT / "docs" / "records.py") as script:
        for name, page in script.PAGES.items():
            assert PAGES[name] == page(), "write it anew: python docs/records.py"


def test_the_python_of_the_readme_runs():
    scope = python_of("README.md")
    assert scope["draws"].guarantee == "exact"
    assert scope["found"].verdict.startswith(("KL(policy‖posterior) is", "Cannot tell"))


CHAIN = ("posterior.md", "sampling.md", "evaluation.md", "swap.md")  # these are read in a row
OTHERS = sorted(name for name, text in PAGES.items() if "```python\n" in text and name not in (*CHAIN, "README.md"))


def test_the_python_of_the_pages_runs():
    scope = python_of(*CHAIN)
    assert scope["log_weights"].shape == (8,)
    assert scope["log_weights"].isfinite().all()
    assert scope["draws"].guarantee == "exact"
    assert scope["found"].verdict.startswith(("KL(policy‖posterior) is", "Cannot tell"))
    assert scope["smiles"]([":) :)", ""]) == [2, 0]


@pytest.mark.parametrize("name", OTHERS)
def test_the_python_of_a_page_runs_by_itself(name):
    assert python_of(name)


def test_links_lead_to_files():
    for name, text in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
        missing = [target for target in targets if not (folder / target).exists()]
        assert missing == [], name


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 10_000
