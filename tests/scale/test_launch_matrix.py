"""
Every trainer, with all weights and with adapters, on every engine that a CPU can start: the result of one process.

Each engine is launched once, by the configuration that is shipped, and goes through all trainings and recipes. Where
there is no GPU accelerate runs DDP in place of FSDP2: it is told of one here (`launched.py`), and recipes are left
out. On GPUs nothing was run.
"""

import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import trl
from filelock import FileLock
from packaging.version import Version
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_bayes import LanguageModel
from rlhf_bayes.diagnostics import evaluate
from rlhf_bayes.testing import toy_reward

from ..children import run as run_child
from .trainings import (
    ONE_FORWARD,
    TOY,
    TRAININGS,
    resume,
    run,
    run_by_one_forward,
    save_models,
    saved_weights,
    trainer_of,
)

pytestmark = [pytest.mark.processes, pytest.mark.slow]
CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
SCRIPT = Path(__file__).with_name("launched.py")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (extra `dev`)")
ENGINES = {"multi_cpu": ("MULTI_CPU", 0), "zero2": ("DEEPSPEED", 2), "zero3": ("DEEPSPEED", 3), "fsdp2": ("FSDP", 0)}
EACH_ENGINE = [pytest.param(name, marks=needs_deepspeed if ENGINES[name][1] else ()) for name in ENGINES]
ONE_FORWARD_ENGINES = [engine for engine in EACH_ENGINE if engine.values != ("zero3",)]
trl_version = Version(trl.__version__)
# clocks; operations, which are counted in whole weights
LOCAL = ("runtime", "_per_second", "step_time", "total_flos")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """One for all workers of pytest-xdist, with the models to start from."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "scale"
    folder.mkdir(exist_ok=True)
    once(folder / "models", save_models)
    return folder


def once(folder: Path, make) -> Path:
    """What `make` puts into the folder, made by whoever comes first."""
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.made").exists():
            make(folder)
            Path(f"{folder}.made").touch()
    return folder


def by_one_process(workplace: Path, training: str) -> Path:
    return once(workplace / f"one-{training}", lambda folder: run(training, workplace / "models", folder, 1))


def launched(workplace: Path, engine: str) -> Path:
    if engine == "zero3" and trl_version < Version("1.16"):
        pytest.skip("trl before 1.16 asks for a device map where there is no GPU, which ZeRO-3 refuses")
    return once(workplace / engine, lambda folder: launch(workplace / "models", folder, engine))


def launch(models: Path, folder: Path, engine: str) -> None:
    if folder.exists():
        pytest.fail(f"{engine} was launched before, and failed")
    folder.mkdir()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command = [*launcher, "--config_file", CONFIGS / f"{engine}.yaml", SCRIPT, models, folder]
    done = run_child([*command, *ENGINES[engine]])
    said = [line for line in done.stderr.splitlines() if "it/s]" not in line]
    assert done.returncode == 0, "\n".join(said[-80:])


def assert_same_weights(folder: Path, expected: Path) -> None:
    ours, theirs = saved_weights(folder), saved_weights(expected)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert_close(ours[name], weight, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("engine", EACH_ENGINE)
def test_takes_the_steps_of_one_process(workplace, engine, training):
    one, two = by_one_process(workplace, training), launched(workplace, engine) / training
    assert_same_weights(two / "final", one / "final")
    if engine == "fsdp2":
        return  # KLs are of log-ratios there, and what rests on them is another estimate
    logs = [json.loads((folder / "log.json").read_text()) for folder in (two, one)]
    for ours, theirs in zip(*logs, strict=True):
        if training == "reward-lora":
            # one process takes its members one by one, DeepSpeed all at once: metrics of the members or of their mean
            theirs = {name: x for name, x in theirs.items() if name.startswith("eval") or name in ("loss", "epoch")}
        if trl_version < Version("1.9"):  # RLOO's own, a mean of each process's mean
            theirs = {name: x for name, x in theirs.items() if name not in ("kl", "eval_kl")}
        for name, value in theirs.items():
            # of rewards, TRL's mean over batches, of which the last is small
            if not name.endswith(LOCAL if "reward" not in training else (*LOCAL, "eval_loss")):
                assert ours[name] == pytest.approx(value, rel=2e-3, abs=1e-4, nan_ok=True), name
    assert any(math.isfinite(entry["loss"]) and entry["loss"] for entry in logs[0] if "loss" in entry)
    if training == "ppo":  # the controller has moved it, by the KL of all processes
        assert {entry["ppo/beta"] for entry in logs[0] if "ppo/beta" in entry} > {0.5}


@pytest.mark.parametrize("training", TRAININGS)
def test_accumulated_gradients_take_the_steps_of_one_batch(workplace, training, tmp_path):
    sizes = {"per_device_train_batch_size": 8 if "reward" in training else 12, "gradient_accumulation_steps": 1}
    trainer = trainer_of(training, workplace / "models", tmp_path, 1, **sizes)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert_same_weights(tmp_path / "final", by_one_process(workplace, training) / "final")


@pytest.fixture(scope="session")
def by_two_forwards(workplace) -> dict:
    return run_by_one_forward(workplace / "models", workplace / "two-forwards", 1, twice=True)


@pytest.mark.parametrize("training", ONE_FORWARD)
@pytest.mark.parametrize("engine", ONE_FORWARD_ENGINES)
def test_one_forward_takes_the_steps_of_two(workplace, engine, training, by_two_forwards):
    one = torch.load(launched(workplace, engine) / "one-forward.pt")[training]
    two = by_two_forwards[training]
    rollouts = {"gdc": 5, "gdc-lora": 3}.get(training, 2)
    # a critic of its own adapter runs the trunk once more
    assert two["forwards"] - one["forwards"] == rollouts * (2 if training == "ppo-lora" else 1)
    assert one["weights"].keys() == two["weights"].keys()
    assert two["moved"] > 1e-3
    for name, weight in two["weights"].items():
        assert_close(one["weights"][name], weight, rtol=1e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")
    # the last step of "gdc" was measured by a forward, after which FSDP2 would leave weights whole
    assert one["sharded"] == (engine == "fsdp2")


@pytest.mark.parametrize("engine", EACH_ENGINE)
def test_no_process_waits_for_one_that_has_less_to_do(workplace, engine):
    lengths, evaluations = json.loads((launched(workplace, engine) / "ragged.json").read_text())
    assert any(first != second for first, second in lengths), "completions were to end at different lengths"
    assert all(math.isfinite(metrics["eval_loss"]) for metrics in evaluations)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("engine", EACH_ENGINE)
def test_resumes_where_it_was(workplace, engine, training):
    folder = launched(workplace, engine) / training
    assert_same_weights(folder / "resumed", folder / "final")


@pytest.mark.parametrize("training", TRAININGS)
def test_two_processes_go_on_as_one(workplace, training, tmp_path, caplog):
    checkpoint = launched(workplace, "multi_cpu") / training / "checkpoint-2"
    resume(training, workplace / "models", tmp_path, 1, checkpoint, tmp_path / "final")
    assert "was written by 2 processes, this run has 1" in caplog.text
    assert "optimizer" not in caplog.text
    assert_same_weights(tmp_path / "final", by_one_process(workplace, training) / "final")


@needs_deepspeed
@pytest.mark.parametrize(("engine", "training"), [("zero2", "reward"), ("zero3", "ppo"), ("zero3", "gdc-lora")])
def test_goes_on_without_deepspeed(workplace, engine, training, tmp_path, caplog):
    checkpoint = launched(workplace, engine) / training / "checkpoint-2"
    # steps of length 0: what was read is what is saved
    resume(training, workplace / "models", tmp_path, 1, checkpoint, tmp_path / "final", learning_rate=0.0)
    assert "the state of the optimizer starts anew" in caplog.text
    assert_same_weights(tmp_path / "final", checkpoint)


@pytest.mark.parametrize("engine", EACH_ENGINE)
def test_what_is_saved_is_read_by_others(workplace, engine):
    folder, prior = launched(workplace, engine), workplace / "models" / "prior"
    ids = torch.arange(4)[None]  # (1, 4)
    plain = AutoModelForCausalLM.from_pretrained(folder / "ppo" / "final")
    assert plain(ids).logits.isfinite().all()
    base = AutoModelForCausalLM.from_pretrained(workplace / "models" / "policy")
    before = base(ids).logits
    for training in ("ppo-lora", "gdc-lora"):
        adapted = PeftModel.from_pretrained(base, folder / training / "final")
        assert (adapted(ids).logits - before).abs().max() > 1e-3
        base = adapted.unload()
    judge = AutoModelForSequenceClassification.from_pretrained(prior, num_labels=1)
    assert PeftModel.from_pretrained(judge, folder / "reward-lora" / "final")(ids).logits.isfinite().all()


@pytest.mark.parametrize("engine", EACH_ENGINE)
def test_the_callback_tells_all_processes_what_one_would_find(workplace, engine):
    folder = launched(workplace, engine) / "ppo"
    said = [json.loads((folder / f"criticism-{rank}.json").read_text()) for rank in range(2)]
    if engine in ("zero3", "fsdp2"):
        assert all("must hold whole weights on each process" in each["works"] for each in said)
        return
    assert said[0]["works"] == said[1]["works"]
    assert said[0]["fails"] == "OSError: the reward is out"
    assert said[1]["fails"] == "RuntimeError: PosteriorCallback failed on the main process: OSError: the reward is out"
    trained = AutoModelForCausalLM.from_pretrained(folder / "final")
    prior, policy = (LanguageModel(m, TOY.tokenizer, TOY.max_completion_length) for m in (TOY.model, trained))
    seeded = torch.Generator().manual_seed(0)
    found = evaluate(policy, prior.tilt(toy_reward, TOY.beta), TOY.prompts, 40, seeded)
    for name in ("elbo", "kl_to_prior", "reward"):
        expected = getattr(found.policy, name)
        assert said[0]["works"][f"eval_posterior_fit/{name}"] == pytest.approx(expected.mean, abs=1e-4)
    exact = TOY.reverse_kl(trained).mean().item()
    assert abs(found.policy.gap.mean - exact) < 5 * found.policy.gap.draws_standard_error


@pytest.mark.parametrize("engine", EACH_ENGINE[:-1])
def test_recipes_end_well(workplace, engine):
    folder = launched(workplace, engine) / "recipes"
    left = {"trainer_state.json", "evaluation.json", "sampling.json", "draws.jsonl", "prior.jsonl"}
    assert left | {"model.safetensors", "curves.png"} <= set(os.listdir(folder / "ppo"))
    assert {"adapter_model.safetensors"} <= set(os.listdir(folder / "ppo-lora"))
    assert {"model.safetensors", "curves.png"} <= set(os.listdir(folder / "gdc"))
    assert {"model.safetensors", "reward_model.json"} <= set(os.listdir(folder / "reward"))
