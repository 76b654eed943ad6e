"""Trainings in bf16 come nearer to the posterior, and draws have the model's distribution: both by enumeration."""

import math

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from rlhf_bayes import LanguageModel
from rlhf_bayes.samplers import ImportanceSampler
from rlhf_bayes.testing import toy_reward

from ..trainers.training import config, gdc_config, logged, trainer

STEPS = 8
TRAININGS = {
    "ppo": (config, {}),
    "ppo, shared critic": (config, {"critic": "shared"}),
    "js": (gdc_config, {"divergence": "js"}),
    "log-variance": (gdc_config, {"divergence": "log_variance"}),
}
LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
# on the CPU what is new is bf16 only: all of these are trained in fp32 by other tests
CASES = [("ppo", True, "cpu"), ("js", False, "cpu")] + [
    pytest.param(kind, lora, "cuda", marks=pytest.mark.gpu) for kind in TRAININGS for lora in (False, True)
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lora", "device"), CASES, indirect=["device"])
def test_a_training_in_bf16_comes_nearer_to_the_posterior(kind, lora, device, toy, tmp_path):
    make_config, options = TRAININGS[kind]
    settings = {"use_cpu": device.type == "cpu", "bf16": True, "max_steps": STEPS, "optim": "adamw_torch"}
    args = make_config(tmp_path, learning_rate=0.03 if lora else 0.01, **settings | options)
    trained = trainer(toy, args, peft_config=LORA if lora else None)
    assert {parameter.device.type for parameter in trained.model.parameters()} == {device.type}
    before = toy.reverse_kl(trained.model).mean().item()
    trained.train()
    assert all(math.isfinite(loss) for loss in logged(trained, "loss"))
    assert len(logged(trained, "posterior/gap")) == STEPS
    assert logged(trained, "nonfinite_steps")[-1] == 0
    after = toy.reverse_kl(trained.model).mean().item()
    assert after < 0.6 * before, f"KL(π‖π*) fell from {before:.3f} to {after:.3f} nats"


def test_draws_and_log_probs_are_those_of_the_enumerated_model(toy, device):
    lm = LanguageModel(
        toy.random_policy(noise=0.0).to(device), toy.tokenizer, toy.max_completion_length, batch_size=512
    )
    rows = [prompt for prompt in toy.prompts for _ in toy.completion_ids]
    found = lm.log_prob(rows, toy.completion_ids * len(toy.prompts)).view_as(toy.log_prior)
    assert found.device.type == device.type
    assert_close(found.cpu(), toy.log_prior, atol=1e-4, rtol=0)
    draws = ImportanceSampler().sample(
        lm.tilt(toy_reward, toy.beta), toy.prompts, 500, torch.Generator().manual_seed(0)
    )
    errors = (draws.log_z.high - draws.log_z.low).cpu() / 1.96 / 2  # (P,)
    assert ((draws.log_z.log_z.cpu() - toy.log_z()).abs() < 5 * errors).all()
    assert (errors < 0.2).all()
