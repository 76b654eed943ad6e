"""A step that learns from a whole rollout uses the forward that scored it: the same steps, with one forward less."""

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from ..training import config, gdc_config, largest_change, prompts_of, trainer, weights

pytestmark = pytest.mark.slow

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
STEPS = {"max_steps": 3, "learning_rate": 0.2}
RUNS = {
    "ppo": (config, {}, None),
    "ppo-ridge": (config, {"critic": "ridge"}, None),
    "ppo-separate": (config, {"critic": "separate", "num_iterations": 2}, None),
    "ppo-warm-up": (config, {"critic": "shared", "critic_warmup_steps": 2}, None),
    "ppo-lora": (config, {"critic": "separate"}, LORA),
    "ppo-checkpointing": (config, {"gradient_checkpointing": True}, LORA),
    "gdc": (gdc_config, {"num_iterations": 2}, None),
    "gdc-lora": (gdc_config, {"divergence": "log_variance"}, LORA),
}


def forwards_and_weights(toy, folder, run, monkeypatch, twice):
    """Forwards of the policy that score completions, and what it ends as."""
    make, changes, peft_config = RUNS[run]
    torch.manual_seed(0)  # adapters and value heads
    trained = trainer(
        toy, make(folder, **STEPS | changes), train_dataset=prompts_of(toy, repeats=4), peft_config=peft_config
    )
    if twice:
        monkeypatch.setattr(type(trained), "step_is_rollout", False)
    forwards = []
    trunk = (trained.model.get_base_model() if peft_config else trained.model).base_model
    trunk.register_forward_pre_hook(lambda module, args, kwargs: forwards.append(kwargs), with_kwargs=True)
    trained.train()
    scoring = [kwargs for kwargs in forwards if kwargs.get("use_cache") is False]
    return len(scoring), weights(trained.model)


@pytest.mark.parametrize("run", RUNS)
def test_saves_a_forward_and_changes_nothing(toy, tmp_path, run, monkeypatch):
    start = weights(trainer(toy, RUNS[run][0](tmp_path)).model)
    once, ours = forwards_and_weights(toy, tmp_path / "once", run, monkeypatch, twice=False)
    more, theirs = forwards_and_weights(toy, tmp_path / "twice", run, monkeypatch, twice=True)
    rollouts = 3 if RUNS[run][1].get("num_iterations", 1) == 1 else 2
    assert more - once == rollouts * (2 if "separate" in str(RUNS[run][1]) and RUNS[run][2] else 1)
    for name, weight in theirs.items():
        assert_close(ours[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    if RUNS[run][2] is None:
        assert largest_change(start, ours) > 1e-3
    else:
        assert max(weight.abs().max() for name, weight in ours.items() if "lora_B.default" in name) > 1e-4


def test_a_rollout_of_several_micro_batches_is_scored_before(toy, tmp_path):
    trained = trainer(toy, config(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=12))
    assert not trained.step_is_rollout
    trained.train()
    assert trained._step_in_progress.graph is None


def test_replay_learns_from_other_rollouts(toy, tmp_path):
    trained = trainer(toy, gdc_config(tmp_path, divergence="log_variance", replay_batches=2))
    assert not trained.step_is_rollout
