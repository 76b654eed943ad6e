"""Causal LMs of Qwen2's kind with random weights, as large as the device deserves. Not a test module."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from rlhf_bayes.lm import enable_completion_scoring


@dataclass(frozen=True)
class Size:
    """The sizes of a model and of a batch of B sequences."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    prompt: int
    completion: int


SIZES = {
    "cpu": Size(layers=2, width=64, heads=4, vocabulary=512, batch=4, prompt=8, completion=16),
    "cuda": Size(layers=12, width=768, heads=12, vocabulary=32768, batch=16, prompt=128, completion=128),
}
LOGIT_SCALE = 2.5  # standard deviation of the logits: entropies of random weights would be near their maximum


def config_of(size: Size) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        max_position_embeddings=size.prompt + size.completion,
    )


def models(size: Size, device: torch.device, *variants: dict[str, Any]) -> list[PreTrainedModel]:
    """
    A model of each variant, all with the same weights, which bf16 can hold, in evaluation mode.

    Args:
        size ([`Size`]): Its shape.
        device (`torch.device`): Where it is put.
        *variants (`dict`): Arguments of `from_config`: `dtype`, `attn_implementation`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = AutoModelForCausalLM.from_config(config_of(size), dtype=torch.float32)
        nn.init.normal_(first.lm_head.weight, std=LOGIT_SCALE / size.width**0.5)
    weights = {name: weight.bfloat16() for name, weight in first.state_dict().items()}
    made = []
    for options in variants:
        # not `.to(dtype)`, which would also round the frequencies of the positions
        model = AutoModelForCausalLM.from_config(config_of(size), **options)
        model.load_state_dict(weights)
        model = model.to(device).eval()
        enable_completion_scoring(model)
        made.append(model)
    return made


def sequences(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random prompts and completions of different lengths, padded, with masks, as `score_completions` takes them."""
    generator = torch.Generator().manual_seed(1)

    def ids(width: int, left: bool) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(size.vocabulary, (size.batch, width), generator=generator)
        lengths = torch.randint(width // 2, width + 1, (size.batch, 1), generator=generator)
        lengths[0] = width
        places = torch.arange(width).expand_as(tokens)
        mask = places >= width - lengths if left else places < lengths
        return tokens.to(device), mask.to(device)

    return (*ids(size.prompt, left=True), *ids(size.completion, left=False))
