"""Predicted memory against models and trainers that exist."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_bayes import PPOConfig, PPOTrainer, toy
from rlhf_bayes.commands import main
from rlhf_bayes.commands.footprint import FOUR_MODELS, Roles, Run, footprint, saved_for_backward
from rlhf_bayes.testing import EnumerableLM

from ..trainers.training import QUIET, prompts_of

BATCH = 3


def llama(device, lora):
    config = AutoConfig.from_pretrained(toy.model_path())
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


@pytest.mark.parametrize("length", [20, "head_dim", "hidden_size"])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_is_kept_for_the_backward_pass_is_what_a_forward_pass_keeps(lora, checkpointing, length):
    model = llama("cpu", lora)
    lm = model.get_base_model() if lora else model
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    length = length if isinstance(length, int) else getattr(model.config, length)
    ids = torch.zeros(BATCH, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeds = lm.get_input_embeddings()(ids).detach().requires_grad_()
        output = lm.base_model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), use_cache=False)
    assert output.last_hidden_state.shape[1] == length
    found = sum(storage.nbytes() for storage in kept.values())
    meta = llama("meta", lora)
    expected = saved_for_backward(meta.get_base_model() if lora else meta, BATCH, length, checkpointing)
    assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("critic", ["ridge", "shared", "separate"])
@pytest.mark.parametrize("lora", [True, False])
def test_weights_are_those_of_a_trainer(tmp_path, critic, lora):
    enumerable = EnumerableLM(vocab_size=4, max_completion_length=3)
    model = enumerable.random_policy()
    config = model.config
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
    trainer = PPOTrainer(
        model,
        lambda completions, **columns: [0.0] * len(completions),
        PPOConfig(str(tmp_path), critic=critic, max_completion_length=3, **QUIET),
        train_dataset=prompts_of(enumerable, 2),
        processing_class=enumerable.tokenizer,
        peft_config=peft_config,
    )
    models = [trainer.model, *([] if trainer.ref_model is None else [trainer.ref_model])]
    parameters = [parameter for part in models for parameter in part.parameters()]
    found = footprint(config, Roles(2 if lora else None, ["q_proj", "v_proj"], critic, "function"), Run())
    assert found.weights == 4 * sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    assert sum(part.gradients for part in found.roles.values()) == 4 * trained
    assert sum(part.optimizer for part in found.roles.values()) == 8 * trained


def test_stages_part_what_they_say():
    config = AutoConfig.from_pretrained(toy.model_path())
    whole = footprint(config, FOUR_MODELS, Run()).roles["policy"]
    parts = [
        footprint(config, FOUR_MODELS, Run(zero_stage=stage, num_processes=4)).roles["policy"] for stage in range(4)
    ]
    for stage, part in enumerate(parts):
        assert part.optimizer == whole.optimizer / (4 if stage >= 1 else 1)
        assert part.gradients == whole.gradients / (4 if stage >= 2 else 1)
        assert part.weights == whole.weights / (4 if stage >= 3 else 1)
    # DeepSpeed's copy in fp32 and two moments; without it, two moments in bf16
    size = whole.weights / 4
    for stage, size_of_optimizer in ((0, 4), (1, 12)):
        run = Run(dtype=torch.bfloat16, zero_stage=stage)
        assert footprint(config, FOUR_MODELS, run).roles["policy"].optimizer == size_of_optimizer * size


def test_one_base_takes_less_than_four_and_an_ensemble_of_adapters_hardly_more():
    config = AutoConfig.from_pretrained(toy.model_path())
    four = footprint(config, FOUR_MODELS, Run())
    one, several = (footprint(config, Roles(8, reward="adapter", reward_members=k), Run()) for k in (1, 4))
    assert one.weights < 0.3 * four.weights
    assert one.peak < several.peak < 1.02 * one.peak


def test_an_adapter_needs_a_base_that_stays():
    with pytest.raises(ValueError, match="`reward` must be 'model' or 'function' without `lora_r`, got 'adapter'"):
        Roles(reward="adapter")


def test_the_command_prints_roles_and_the_baseline(capsys):
    main(["memory", "--lora_r", "16", "--zero_stage", "2", "--num_processes", "2", "--gradient-checkpointing"])
    printed = capsys.readouterr().out
    for word in ("policy", "reference", "critic", "reward", "training", "peak", "four full models"):
        assert word in printed
    with pytest.raises(SystemExit):
        main(["memory", "--batch", "0"])
    said = capsys.readouterr().err
    assert "--batch is called --per_device_train_batch_size now" in said
    assert "`--per_device_train_batch_size` must be at least 1, got 0" in said
