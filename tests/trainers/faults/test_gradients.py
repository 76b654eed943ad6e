"""A gradient that is not finite is skipped and counted; several in a row end the training with a checkpoint."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_bayes import RewardConfig
from rlhf_bayes.trainers.faults.step_watch import StepWatch, all_finite

from ..training import weights
from .test_resumed_runs import assert_same_weights, make

pytestmark = pytest.mark.slow

KINDS = ("ppo", "gdc", "reward")


def spoilt(run, *steps, value=math.nan):
    """The trainer, with an entry of a gradient changed at these optimizer steps (from 0); its weights before each."""
    before = {}
    plain = run.training_step

    def training_step(*arguments):
        loss = plain(*arguments)
        step = run.state.global_step
        before[step] = weights(run.model)
        if step in steps and run.accelerator.sync_gradients:
            parameter = [p for p in run.model.parameters() if p.grad is not None][-1]
            parameter.grad.view(-1)[0] = value
        return loss

    run.training_step = training_step
    return run, before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_the_step_is_skipped_and_counted(kind, value, max_grad_norm, toy, tmp_path, caplog):
    options = {"max_grad_norm": max_grad_norm, "weight_decay": 0.1, "optim": "adamw_torch"}
    run, before = spoilt(make(kind, toy, tmp_path, logging_steps=1, **options), 2, 3, value=value)
    run.train()
    assert run.state.global_step == 6
    for step in (2, 3):
        assert all(torch.equal(before[step][name], weight) for name, weight in before[step + 1].items())
    assert any(not torch.equal(before[4][name], weight) for name, weight in before[5].items())
    counted = [entry["nonfinite_steps"] for entry in run.state.log_history if "nonfinite_steps" in entry]
    assert counted == [0, 0, 1, 1, 0, 0]
    assert "optimizer step 3 is not finite: the step is skipped (1 in a row; training stops at 3)" in caplog.text
    assert all(weight.isfinite().all() for weight in weights(run.model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_several_in_a_row_stop_the_training_with_a_checkpoint(kind, toy, tmp_path):
    run, before = spoilt(make(kind, toy, tmp_path, save_steps=100, max_steps=9, max_nonfinite_steps=2), 1, 3, 4, 5)
    with pytest.raises(FloatingPointError, match="2 optimizer steps in a row were not finite") as caught:
        run.train()
    assert run.state.global_step == 5
    assert "checkpoint-5`: go on from it" in "\n".join(caught.value.__notes__)
    resumed = make(kind, toy, tmp_path, max_steps=5)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, run)
    assert all(torch.equal(weight, before[3][name]) for name, weight in weights(run.model).items())


def test_without_checkpoints_none_is_saved(toy, tmp_path):
    run, _ = spoilt(make("ppo", toy, tmp_path, save_strategy="no", max_nonfinite_steps=1), 1)
    with pytest.raises(FloatingPointError):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_scaler_looks_after_itself(toy, tmp_path):
    run, _ = spoilt(make("ppo", toy, tmp_path), 1)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)  # of fp16: it skips such steps itself
    with pytest.raises(RuntimeError, match="nan"):  # this one does not: the step was taken
        run.train()
    assert not any("nonfinite_steps" in entry for entry in run.state.log_history)


class Engine:
    """What is asked of DeepSpeed's after its step."""

    def __init__(self, applied, norm):
        self.was_step_applied = lambda: applied
        self.get_global_grad_norm = lambda: norm


def test_deepspeed_skips_steps_itself():
    watch = StepWatch(SimpleNamespace(model_wrapped=Engine(True, 1.0)))
    assert not watch._deepspeed_skipped(3)
    watch.trainer.model_wrapped = Engine(False, math.inf)
    assert watch._deepspeed_skipped(3)
    watch.trainer.model_wrapped = Engine(True, torch.tensor(math.nan))
    with pytest.raises(FloatingPointError, match="optimizer step 3 is not finite, and DeepSpeed has taken the step"):
        watch._deepspeed_skipped(3)


def test_what_is_finite():
    assert all_finite([])
    assert all_finite([torch.zeros(0), torch.full((3,), 1e30), torch.ones(2, dtype=torch.bfloat16)])
    for value in (math.nan, math.inf, -math.inf):
        assert not all_finite([torch.ones(2), torch.tensor([1.0, value, 2.0])])


@pytest.mark.parametrize("count", [0, 1.5, True])
def test_the_number_of_steps_is_checked(count, tmp_path):
    with pytest.raises(
        ValueError, match=rf"`max_nonfinite_steps` must be at least 1 \(optimizer steps\), got {count}"
    ):
        RewardConfig(str(tmp_path), use_cpu=True, bf16=False, max_nonfinite_steps=count)
