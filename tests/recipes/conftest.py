"""Recipes in this process: a launch is mostly imports. A test module names its recipe by a fixture `recipe`."""

import sys

import pytest


@pytest.fixture
def run_in_process(recipe, monkeypatch, tmp_path):
    """Runs main() with flags in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", *map(str, flags)])
        recipe.main()

    return run
