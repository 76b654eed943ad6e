"""Trainings without padding are those with it: the same weights from fewer tokens."""

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from rlhf_bayes.lm import enable_completion_scoring
from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.forward import packs_rows

from ...lm.families import tiny_model
from ..image_models import dataset_of_images, processor_and_model
from ..training import config, gdc_config, largest_change, prompts_of, trainer, weights

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
STEPS = {"max_steps": 3, "learning_rate": 0.2}
SHORT = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 2}
RUNS = {
    "ppo": (config, {}, None),
    "ppo-micro-batches": (config, SHORT | {"critic": "shared"}, None),
    "ppo-separate": (config, {"critic": "separate", "num_iterations": 2}, None),
    "ppo-lora-checkpointing": (config, {"critic": "separate", "gradient_checkpointing": True}, LORA),
    "gdc": (gdc_config, {"num_iterations": 2}, None),
    "gdc-lora": (gdc_config, SHORT | {"divergence": "log_variance"}, LORA),
}


def trained(toy, folder, run, padding_free):
    """The trainer after its training, and how many tokens its policy's trunk read to score."""
    make, changes, peft_config = RUNS[run]
    torch.manual_seed(0)  # adapters and value heads
    args = make(folder, **STEPS | changes, padding_free=padding_free)
    data = prompts_of(toy, repeats=4)
    own = trainer(toy, args, train_dataset=data, peft_config=peft_config)
    read = []

    def noted(module, args, kwargs):
        if kwargs.get("use_cache") is False:
            read.append(kwargs["input_ids"].numel())

    base_causal_lm(own.model).base_model.register_forward_pre_hook(noted, with_kwargs=True)
    start = weights(own.model)
    own.train()
    return own, sum(read), start


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_ends_with_the_same_weights_from_fewer_tokens(toy, tmp_path, run):
    theirs, padded, start = trained(toy, tmp_path / "padded", run, padding_free=False)
    ours, packed, _ = trained(toy, tmp_path / "packed", run, padding_free=True)
    assert packed < padded
    ends = weights(theirs.model)
    for name, weight in weights(ours.model).items():
        assert_close(weight, ends[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert max(largest_change(start, ends), largest_change(start, ends, critic=True)) > 1e-3
    if theirs.reference.module is not None:
        assert packs_rows(ours.reference.module)
        assert not packs_rows(theirs.reference.module)


def test_padded_is_the_default(toy, tmp_path):
    own = trainer(toy, config(tmp_path))
    assert not packs_rows(own.model)


def test_a_prior_of_another_family_is_checked_too(toy, tmp_path):
    bloom = tiny_model("bloom")
    bloom.resize_token_embeddings(toy.model.config.vocab_size)
    enable_completion_scoring(bloom)
    with pytest.raises(ValueError, match="`padding_free` must be False for BloomForCausalLM, got True: the log-probs"):
        trainer(toy, config(tmp_path, padding_free=True), ref_model=bloom)


def test_images_are_refused_before_the_model_is_loaded(toy, tmp_path):
    processor, _ = processor_and_model("llava")
    arguments = {"train_dataset": dataset_of_images(), "processing_class": processor}
    with pytest.raises(
        ValueError, match="`padding_free` must be False with a processor, got True with LlavaProcessor"
    ):
        trainer(toy, config(tmp_path, padding_free=True), model="nowhere", **arguments)
