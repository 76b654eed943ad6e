"""The recipe with few steps; that it votes as the annotator does, and where it sees the best gold reward."""

import re
from pathlib import Path

import pytest

from rlhf_bayes.rewards import RewardEnsemble, RewardModel, load_reward
from rlhf_bayes.toy.rewards import sentiment

from ..scripts import loaded_script, run_script

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "rlhf.py"
FEW = ["--num_pairs", "12", "--reward_epochs", "1", "--max_steps", "2", "--batch_size", "8", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def recipe():
    with loaded_script(RECIPE) as module:
        yield module


@pytest.mark.processes
def test_from_preferences_to_policies(tmp_path):
    output = run_script(RECIPE, "--num_seeds", "2", "--num_members", "2", *FEW, cwd=tmp_path, columns=80)
    # a row a seed, then two for their mean
    rows = [line.split() for line in output.splitlines() if re.search(r"\d\.\d\d\s*$", line)]
    assert [row[-8] for row in rows] == ["0", "1", "mean", "±"] * 2
    folder = tmp_path / "runs" / "rlhf"
    assert (folder / "overoptimization.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(load_reward(folder / "single_reward_model_1" / "reward"), RewardModel)
    assert isinstance(load_reward(folder / "pessimistic_ensemble_1" / "reward"), RewardEnsemble)
    assert (folder / "pessimistic_ensemble_1" / "policy" / "model.safetensors").exists()


def test_pairs_are_those_of_one_annotator(recipe):
    wrong = {}
    for annotator in ("careful", "careless"):
        pairs = recipe.judged_pairs(annotator, 1500, seed=0)
        assert set(pairs.column_names) == {"prompt", "chosen", "rejected"}
        clear = [row for row in pairs if abs(sentiment(row["chosen"]) - sentiment(row["rejected"])) > 0.6]
        wrong[annotator] = sum(sentiment(r["chosen"]) < sentiment(r["rejected"]) for r in clear) / len(clear)
    # error rates .05 and .45, and σ(−Δ/τ) on top; some 800 pairs each
    assert wrong["careful"] == pytest.approx(0.06, abs=0.04)
    assert wrong["careless"] == pytest.approx(0.45, abs=0.08)
    with pytest.raises(ValueError, match="`num_pairs` must be from 1 to"):
        recipe.judged_pairs("careful", 10_000, seed=0)


def test_the_best_is_read_off_gold(recipe):
    run = recipe.Run([0, 10, 20], proxy=[0.0, 1.0, 2.0], gold=[0.0, 0.5, -1.0], kl=[0.0, 2.0, 9.0])
    assert run.best == 1
    assert run.at(run.best) == (1.0, 0.5, 2.0)
    other = recipe.Run([0, 10, 20], proxy=[0.0, 3.0, 4.0], gold=[0.0, 1.5, 2.0], kl=[0.0, 1.0, 1.0])
    assert recipe.mean_curves([run, other]) == ([0, 10, 20], [0.0, 2.0, 3.0], [0.0, 1.0, 0.5])
