"""Every objective runs from the same script and is judged by the same number."""

from pathlib import Path

import pytest

from ..scripts import loaded_script

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "swap_objective.py"
FEW = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--num_generations", "4", "--report_prompts", "2"]
SMALL = [*FEW, "--report_samples", "32", "--max_completion_length", "24"]
OBJECTIVES = ["rloo", "ppo", "gdc-forward", "gdc-js", "gdc-alpha", "gdc-log-variance"]


@pytest.fixture(scope="module")
def recipe():
    with loaded_script(RECIPE) as module:
        yield module


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_same_data_and_flags(run_in_process, tmp_path, capsys, objective):
    run_in_process("--objective", objective, *SMALL)
    output = capsys.readouterr().out
    assert "│ gap = KL to posterior (nats)" in output
    assert "β = 0.25" in output
    assert (tmp_path / "runs" / "swap_objective" / objective / "model.safetensors").exists()


@pytest.mark.parametrize(("objective", "name"), [("ppo", "kind"), ("gdc-log-variance", "kind_but")])
def test_towards_a_likelihood(run_in_process, evidence, tmp_path, capsys, objective, name):
    run_in_process("--objective", objective, "--likelihood", f"{evidence}:{name}", *SMALL)
    output = capsys.readouterr().out
    assert "Distance to the posterior π0·exp(log-likelihood)/Z" in output
    assert "│ gap = KL to posterior (nats)" in output
    assert (tmp_path / "runs" / "swap_objective" / objective / "model.safetensors").exists()


def test_a_likelihood_that_the_objective_cannot_take(run_in_process, evidence):
    with pytest.raises(ValueError, match=r"`--likelihood` must be left out with `--objective rloo`.*one of ppo, gdc-"):
        run_in_process("--likelihood", f"{evidence}:kind", *SMALL)
    with pytest.raises(ValueError, match="`likelihood` must not forbid completions with PPO"):
        run_in_process("--objective", "ppo", "--likelihood", f"{evidence}:but", *SMALL)
    with pytest.raises(ValueError, match="`--reward_func` must be left out with `--likelihood`"):
        run_in_process("--objective", "ppo", "--likelihood", f"{evidence}:but", "--reward_func", "a:b", *SMALL)


def test_objective_and_its_own_flags_from_yaml(recipe, run_in_process, monkeypatch, tmp_path):
    made = {}

    def trainer(args, **arguments):
        made.update(arguments | {"args": args})
        raise KeyboardInterrupt

    monkeypatch.setitem(recipe.OBJECTIVES, "gdc-alpha", (trainer, *recipe.OBJECTIVES["gdc-alpha"][1:]))
    (tmp_path / "run.yaml").write_text("objective: gdc-alpha\nalpha: 0.3\nreplay_batches: 4\nbeta: 0.1\n")
    with pytest.raises(KeyboardInterrupt):
        run_in_process("--config", "run.yaml")
    args = made["args"]
    assert (args.divergence, args.alpha, args.replay_batches, args.beta) == ("alpha", 0.3, 4, 0.1)
    assert args.max_steps == 300


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "some/model"], "`--dataset_name` must be given"),
        (["--model_name_or_path", "some/model", "--dataset_name", "rows.jsonl"], "`--reward_func module:function`"),
        (["--objective", "gdc-js", "--alpha", "0.5"], "alpha"),
    ],
)
def test_wrong_flags_end_before_the_model_is_loaded(run_in_process, flags, message):
    with pytest.raises(ValueError, match=message):
        run_in_process(*flags)


def test_unknown_objectives_are_named(run_in_process, capsys):
    with pytest.raises(SystemExit):
        run_in_process("--objective", "dpo")
    assert "rloo" in capsys.readouterr().err
