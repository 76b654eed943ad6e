"""Sampling from the raw model: temperature and nothing else."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from rlhf_bayes.lm.forward import base_causal_lm


@contextmanager
def raw_generation_config(model: nn.Module) -> Iterator[None]:
    """
    Give the model an empty generation config for a while.

    `generate` fills every field that a call leaves unset from the model's own generation config, where many published
    models carry top_k, top_p or a repetition penalty; completions would then come from another distribution than the
    one whose log-probabilities are computed.
    """
    with ExitStack() as stack:
        for owner in {id(owner): owner for owner in (model, base_causal_lm(model))}.values():
            config = owner.generation_config
            stack.callback(setattr, owner, "generation_config", config)
            owner.generation_config = GenerationConfig(
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
                cache_implementation=config.cache_implementation,
            )
        yield


def remove_dropout(model: nn.Module) -> None:
    """
    Set the dropout rates that modules hold as numbers to 0, for good.

    `attention_dropout` is one: it is no `nn.Dropout`, so TRL's `disable_dropout` leaves it on.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def sampling_config(
    max_new_tokens: int, eos_token_ids: list[int], pad_token_id: int, temperature: float
) -> GenerationConfig:
    """
    A generation config that draws from the model's distribution at a temperature, without truncation.

    Args:
        max_new_tokens (`int`):
            Longest completion, in tokens.
        eos_token_ids (`list[int]`):
            The tokens that end a completion.
        pad_token_id (`int`):
            The token that shorter completions are padded with.
        temperature (`float`):
            Divides the logits.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=eos_token_ids,
        pad_token_id=pad_token_id,
        disable_compile=True,
    )


def first_eos_mask(completion_ids: Tensor, eos_token_ids: list[int]) -> Tensor:
    """(B, T) token ids to a bool mask (B, T) of the tokens up to and including the first EOS."""
    is_eos = torch.isin(completion_ids, torch.tensor(eos_token_ids, device=completion_ids.device))
    return (is_eos.cumsum(-1) - is_eos.long()) == 0
