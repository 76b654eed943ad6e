"""QLoRA: the reference is the quantised base, and the policy moves away from it."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer, toy
from rlhf_bayes.toy.rewards import sentiment_reward

from ..trainers.training import QUIET, config, logged

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; `make test-gpu` installs it")

# bits -> its configuration, and how far the reference may be from the base that is loaded alone, nats per completion
QUANTISED = {
    "4 bits": ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, 0.01),
    "8 bits": ({"load_in_8bit": True}, 0.2),  # whose rounding of activations depends on the batch
}
TRAINERS = {
    "ppo": (PPOConfig, PPOTrainer, {}),
    "ppo, separate critic": (PPOConfig, PPOTrainer, {"critic": "separate"}),
    "js": (GDCConfig, GDCTrainer, {"divergence": "js"}),
}
PROMPTS = toy.prompts()[:4]


def rows_of(rollout):
    """Prompt and completion of each row, without padding."""
    columns = (rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, rollout.completion_mask)
    for prompt, prompt_mask, completion, mask in zip(*columns, strict=True):
        yield prompt[prompt_mask.bool()], completion[mask.bool()]


@torch.no_grad()
def log_prob_alone(model, prompt, completion):
    """log π(completion | prompt) by the model's own logits, in a batch of one."""
    logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, completion[:, None]).sum()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("bits", QUANTISED)
def test_the_reference_is_the_quantised_base(bits, kind, device, tmp_path):
    settings, tolerance = QUANTISED[bits]
    quantization = BitsAndBytesConfig(**settings)
    config_class, trainer_class, options = TRAINERS[kind]
    sizes = {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 12, "max_steps": 4}
    device_map = {"": "cpu" if device.type == "cpu" else 0}  # bitsandbytes would take a GPU where there is one
    placed = QUIET | {"use_cpu": device.type == "cpu", "model_init_kwargs": {"device_map": device_map}}
    rate = {"learning_rate": 0.01, "optim": "adamw_torch", "beta": 0.1}
    trained = trainer_class(
        toy.model_path(),
        sentiment_reward,
        config(tmp_path, config_class, **sizes, **placed, **rate, **options),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        quantization_config=quantization,
    )
    rollouts, make_batch = [], trained.objective.batch
    trained.objective.batch = lambda rollout: (rollouts.append(rollout), make_batch(rollout))[1]
    trained.train()
    assert all(math.isfinite(loss) for loss in logged(trained, "loss"))
    first, last = rollouts[0], rollouts[-1]
    moved = [(x.token_log_probs - x.ref_token_log_probs).sum(-1).abs().max().item() for x in (first, last)]
    assert moved[0] < tolerance < moved[1]
    base = AutoModelForCausalLM.from_pretrained(
        toy.model_path(), quantization_config=quantization, device_map=device_map
    )
    of_base = [log_prob_alone(base, *row) for row in rows_of(last)]
    assert (last.ref_token_log_probs.sum(-1) - torch.stack(of_base)).abs().max() < tolerance
