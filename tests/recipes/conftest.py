"""Recipes in this process: a launch is mostly imports. A test module names its recipe by a fixture `recipe`."""

import sys

import pytest

EVIDENCE = """
from rlhf_bayes.likelihoods import Constraint, ProductLikelihood, RewardLikelihood
from rlhf_bayes.toy.rewards import sentiment_reward


def says_but(completions, **columns):
    return [" but " in text for text in completions]


kind = RewardLikelihood(sentiment_reward, beta=0.5)
but = Constraint(says_but)


def kind_but():
    return ProductLikelihood([kind, but])
"""


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    """A recipe refuses an output folder that holds a run, as `runs/` of this folder does after `make ppo`."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_in_process(recipe, monkeypatch):
    """Runs main() with flags in an empty folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", *map(str, flags)])
        recipe.main()

    return run


@pytest.fixture
def evidence(run_in_process, tmp_path):
    """A module in that folder with likelihoods: `kind` (a reward), `but` (a condition), and what makes both."""
    (tmp_path / "evidence_of_recipes.py").write_text(EVIDENCE)
    yield "evidence_of_recipes"
    sys.modules.pop("evidence_of_recipes", None)
