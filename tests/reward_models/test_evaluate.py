"""The script as a user runs it, on two small models; and what wrong flags end in."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_bayes import toy
from rlhf_bayes.rewards import RewardEnsemble, RewardModel

from ..scripts import run_script

SCRIPT = Path(__file__).resolve().parents[2] / "reward_models" / "evaluate.py"
FEW = ["--num_prompts", "3", "--num_samples", "8", "--max_completion_length", "12"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random model and a random ensemble of two heads, on disk."""
    folder = tmp_path_factory.mktemp("rewards")
    tokenizer = AutoTokenizer.from_pretrained(toy.model_path())
    for name, num_labels in (("one", 1), ("two", 2)):
        torch.manual_seed(num_labels)
        model = AutoModelForSequenceClassification.from_pretrained(toy.model_path(), num_labels=num_labels)
        (RewardModel if num_labels == 1 else RewardEnsemble)(model, tokenizer).save_pretrained(folder / name)
    return [str(folder / "one"), str(folder / "two")]


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")
    spec = importlib.util.spec_from_file_location("reward_models_evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "reward_models_evaluate", module)  # dataclasses look their module up
    spec.loader.exec_module(module)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        module.main()

    run.module = module
    return run


@pytest.mark.processes
@pytest.mark.slow
def test_two_models_on_the_toy(models, tmp_path):
    output = run_script(SCRIPT, "--reward_model_path", *models, "--max_pairs", "40", *FEW, cwd=tmp_path)
    for expected in ("40 pairs (raw rewards)", "Δ = 0", "one", "two, mean", "two, min", "gold itself", "n = 8"):
        assert expected in output
    for plot in ("reliability.png", "best_of_n.png"):
        assert (tmp_path / "runs" / "evaluate" / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_own_pairs_without_a_gold_reward(script, models, tmp_path, capsys):
    rows = [{"better": "The hotel was good.", "worse": f"The hotel was {bad}."} for bad in ("bad", "poor", "dull")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script(
        *("--reward_model_path", models[0], "--dataset_name", "pairs.jsonl", "--output_dir", "out"),
        *("--columns", "chosen=better", "rejected=worse"),
    )
    assert "3 pairs" in capsys.readouterr().out
    assert (tmp_path / "out" / "reliability.png").exists()
    assert not (tmp_path / "out" / "best_of_n.png").exists()


def test_a_gold_reward_of_ones_own(script, models, tmp_path, capsys):
    (tmp_path / "gold_of_test_evaluate.py").write_text(
        "def length(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    flags = ["--max_pairs", 10, "--gold_reward", "gold_of_test_evaluate:length", "--reward_rule", "mean", *FEW]
    script("--reward_model_path", models[1], *flags)
    output = capsys.readouterr().out
    assert "two, mean" in output
    assert "two, min" not in output


def test_names_are_as_short_as_tells_them_apart(script):
    names = script.module.short_names
    assert names(["runs/a", "runs/b"]) == ["a", "b"]
    assert names(["x/runs/a", "y/runs/a", "y/runs/b"]) == ["x/runs/a", "y/runs/a", "y/runs/b"]
    assert names(["runs/1/reward", "runs/2/reward"]) == ["1/reward", "2/reward"]
    assert names(["one"]) == ["one"]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ([], ValueError, "must name at least one folder.*accelerate launch reward_models/train.py"),
        (["--reward_model_path", "runs/none"], FileNotFoundError, "must be a folder that exists.*got 'runs/none'"),
        (["--reward_model_path", "a/b", "--reward_rule", "pessimistic"], ValueError, "`beta` must be given"),
        (["--reward_model_path", "a/b", "--dataset_name", "c", "--gold_reward", "d:e"], ValueError, "given together"),
        (["--reward_model_path", "a/b", "--gold_reward", "no_colon"], ValueError, "the form `module:function`"),
    ],
)
def test_wrong_flags(script, flags, error, message):
    with pytest.raises(error, match=message):
        script(*flags)
