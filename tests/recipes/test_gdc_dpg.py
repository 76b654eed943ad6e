"""The recipe as a user launches it, in a process of its own, with few steps; and what wrong flags end in."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_bayes import LanguageModel, toy
from rlhf_bayes.commands import train_gdc
from rlhf_bayes.commands.flags import parse_features
from rlhf_bayes.report import read_runs

from ..scripts import run_script

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "gdc_dpg.py"
SHARED = ROOT.parent / "shared"
FEW = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--num_generations", "4", "--logging_steps", "1"]
SMALL = [*FEW, "--report_prompts", "2", "--report_samples", "32", "--max_completion_length", "24"]


@pytest.fixture(scope="module")
def recipe():
    """What the recipe runs."""
    return train_gdc


@pytest.mark.processes
def test_without_arguments_trains_the_bundled_model(tmp_path):
    accelerate = (sys.executable, "-m", "accelerate.commands.launch")
    flags = ["--fit_samples", 64, "--report_samples", 16]
    output = run_script(RECIPE, *FEW, *flags, cwd=tmp_path, launcher=accelerate)
    for expected in (
        "closest to the prior",
        "∞: a condition",
        "Samples",
        "The movie",
        "prior (before)",
        "trustworthy",
    ):
        assert expected in output
    rows = ("but, 1 wanted", "not, 0.5 wanted", "KL from posterior", "total variation", "KL to prior", "distinct-2")
    for quantity in rows:
        assert f"│ {quantity}" in output
    folder = tmp_path / "runs" / "gdc_dpg"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    (run,) = read_runs([folder])
    assert (run.beta, run.sampling["moments"]) == (None, {"but": 1.0, "not": 0.5})
    assert set(run.before[0].scores) == {"but", "not"}
    assert 1 in run.curve("posterior/moments/not")[0]
    policy = AutoModelForCausalLM.from_pretrained(folder)
    prior = AutoModelForCausalLM.from_pretrained(toy.model_path())
    assert any((after != before).any() for after, before in zip(policy.parameters(), prior.parameters(), strict=True))


def test_own_prompts_features_and_lora_from_yaml(run_in_process, tmp_path, capsys):
    rows = [{"question": "The hotel", "least": 20}, {"question": "I thought the soup", "least": 40}] * 2
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_features.py").write_text(
        "def is_long(completions, least, **columns):\n"
        "    return [len(text) > length for text, length in zip(completions, least, strict=True)]\n"
    )
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {toy.model_path()}\ndataset_name: prompts.jsonl\nprompt_column: question\n"
        "output_dir: out\nlearning_rate: 1.0e-3\nuse_peft: true\nlora_r: 4\nwords: ['strong:very,truly=0.4']\n"
    )
    flags = ["--features", "my_features:is_long=0.8", "--divergence", "js", "--fit_samples", 64]
    run_in_process("--config", "run.yaml", *flags, *SMALL)
    output = capsys.readouterr().out
    assert "is_long, 0.8 wanted" in output
    assert "strong, 0.4 wanted" in output
    assert "forbidden" not in output
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_towards_a_likelihood(recipe, run_in_process, evidence, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recipe, "fitted_evidence", lambda *args: pytest.fail("λ would be fitted"))
    run_in_process("--likelihood", f"{evidence}:kind_but", "--output_dir", "out", *SMALL)
    output = capsys.readouterr().out
    assert "Distance to the posterior π0·exp(log-likelihood)/Z" in output
    assert "│ forbidden (share)" in output
    (run,) = read_runs([tmp_path / "out"])
    assert run.sampling["settings"]["likelihood"] == f"{evidence}:kind_but"
    assert 1 in run.curve("posterior/moments/says_but")[0]


@pytest.mark.parametrize("flags", [["--words", "but=1"], ["--features", "f:g=1"], ["--fit_samples", "8"]])
def test_features_do_not_go_with_a_likelihood(run_in_process, evidence, flags):
    with pytest.raises(ValueError, match=f"`{flags[0]}` must be left out with `--likelihood`"):
        run_in_process("--likelihood", f"{evidence}:kind", *flags, *SMALL)


def test_conditions_alone_need_no_draws(recipe, run_in_process, monkeypatch, capsys):
    monkeypatch.setattr(LanguageModel, "constrain", lambda *args, **options: pytest.fail("λ would be fitted"))
    flags = ["--divergence", "log_variance", "--replay_batches", 2, "--num_iterations", 2, "--output_dir", "out"]
    run_in_process("--words", "but=1", "--words", "not=0", *flags, *SMALL)
    assert "not, 0 wanted" in capsys.readouterr().out
    constraints = parse_features(words=["but=1", "not=0"])
    likelihood = recipe.evidence_of(None, constraints, None, recipe.Arguments(), 0)
    texts = [" was good but not cheap.", " was good but dear.", " was good."]
    assert likelihood.log_likelihood(texts, texts, [[1]] * 3).tolist() == [-math.inf, 0.0, -math.inf]


@pytest.mark.processes
@pytest.mark.skipif(not SHARED.is_dir(), reason="the model stories260K and its prompts are not beside the project")
def test_stories_with_animals(tmp_path):
    output = run_script(
        RECIPE,
        *("--model_name_or_path", SHARED / "models" / "stories260K"),
        *("--dataset_name", SHARED / "data" / "tinystories" / "first_sentences.jsonl.gz"),
        *("--prompt_column", "text", "--max_prompts", 8, "--words", "animal:cat,dog,bird,fish,bear=0.3"),
        *("--fit_samples", 64, "--learning_rate", 1e-4, "--output_dir", tmp_path / "out", *SMALL),
        cwd=tmp_path,
    )
    assert "animal, 0.3 wanted" in output
    assert re.search(r"animal +│ +\d", output)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--words", "but"], "`words` must have the form"),
        (["--features", "no_such_module:f=1"], "a module that can be imported"),
        (["--beta", 0.1, "--words", "but=1"], "`beta` must be left out with `likelihood`"),
        (["--model_name_or_path", "some/model"], "`--dataset_name` must be given"),
        (["--model_name_or_path", "some/model", "--dataset_name", "rows.jsonl"], "`--features .*, `--words"),
        (
            ["--divergence", "reverse_kl", "--words", "but=1"],
            "must not forbid completions with `divergence`='reverse_kl'",
        ),
    ],
)
def test_wrong_flags_end_before_training(recipe, run_in_process, monkeypatch, flags, message):
    monkeypatch.setattr(recipe.GDCTrainer, "train", lambda *args, **options: pytest.fail("it would train"))
    with pytest.raises(ValueError, match=message):
        run_in_process(*flags, "--fit_samples", 32, "--output_dir", "out")


def test_the_bundled_model_has_defaults_of_its_own(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gdc_dpg.py", "--num_generations", "16"])
    args, training_args, model_args = recipe.parse_arguments()
    assert model_args.model_name_or_path == toy.model_path()
    assert args.words == ["but=1", "not=0.5"]
    assert (training_args.num_generations, training_args.max_completion_length) == (16, 32)
    assert training_args.use_cpu != torch.cuda.is_available()

    own = ["--model_name_or_path", "a/b", "--dataset_name", "c/d", "--words", "a=1", "--words", "b,c=0.5"]
    monkeypatch.setattr(sys, "argv", ["gdc_dpg.py", *own])
    args, training_args, model_args = recipe.parse_arguments()
    assert args.words == ["a=1", "b,c=0.5"]
    assert args.features == []
    assert training_args.learning_rate == recipe.GDCConfig("x", bf16=False, use_cpu=True).learning_rate
