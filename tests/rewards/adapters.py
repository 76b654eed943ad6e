"""Reward models of several members on disk and in memory, built here. Not a test module."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, LlamaForSequenceClassification

PROMPTS = ["ab", "c", "fade", "b", "da"]
COMPLETIONS = ["cd", "", "deaf", "add", "f"]
TEXTS = ["abcd", "c", "fadedeaf", "badd", "daf"]


def lora_config(**changes) -> LoraConfig:
    defaults = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    return LoraConfig(**defaults | changes)


def saved_base(llama, tokenizer, folder: Path, causal: bool = True) -> str:
    """A base on disk: a causal LM, which has no classification head."""
    model = llama
    if causal:
        model = LlamaForCausalLM(llama.config)
        model.model.load_state_dict(llama.model.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def adapters(base: str, num_members: int, **changes) -> PeftModel:
    """A base under adapters `default`, `member_1`, …, whose matrices and heads are all random."""
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, lora_config(**changes))
    for member in range(1, num_members):
        model.add_adapter(f"member_{member}", lora_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5)
    return model


def heads(llama, num_members: int) -> LlamaForSequenceClassification:
    """The trunk of `llama` with so many labels."""
    torch.manual_seed(5)
    config = type(llama.config)(**llama.config.to_dict() | {"num_labels": num_members})
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(llama.model.state_dict())
    return model


@torch.no_grad()
def one_at_a_time(model: nn.Module, tokenizer, texts: list[str], label: int = 0) -> Tensor:
    """No padding, no batch: what every batched score must agree with (N,)."""
    rows = [tokenizer.convert_tokens_to_ids(list(text)) for text in texts]
    return torch.stack([model.eval()(input_ids=torch.tensor([row])).logits[0, label] for row in rows])


def adapters_one_at_a_time(model: PeftModel, tokenizer, texts: list[str]) -> Tensor:
    """PEFT's own switch of adapters, one text at a time (K, N)."""
    active = model.active_adapter
    rewards = []
    for adapter in model.peft_config:
        model.set_adapter(adapter)
        rewards.append(one_at_a_time(model, tokenizer, texts))
    model.set_adapter(active)
    return torch.stack(rewards)
