"""Sampling from the raw model, with a temperature and no truncation."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.head import excluded_tokens
from rlhf_bayes.lm.model_inputs import RowInputs, collated
from rlhf_bayes.lm.probe import disagreement, plain_logits


@contextmanager
def raw_generation_config(model: nn.Module) -> Iterator[None]:
    """
    A context in which the model has an empty generation config.

    `generate` takes every field that a call leaves unset from the model's own generation config. Many published models
    set top_k, top_p or a repetition penalty there, and completions would then come from another distribution than the
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
    """Mask of the tokens up to and including the first EOS: token ids (B, T) -> bool (B, T)."""
    is_eos = torch.isin(completion_ids, torch.tensor(eos_token_ids, device=completion_ids.device))
    return (is_eos.cumsum(-1) - is_eos.long()) == 0


@torch.no_grad()
def draw_plainly(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: list[int],
    temperature: float,
) -> list[list[int]]:
    """
    Draw completions by whole forward passes, without a cache and without padding, from the global random state.

    Slower than `generate`, which keeps a cache, by about the number of tokens; for models that are right in no other
    way (see [`~rlhf_bayes.lm.forward.runs_plainly`]).

    Args:
        model (`nn.Module`):
            A causal LM, PEFT-wrapped or not.
        prompt_ids (`Sequence[Sequence[int]]`):
            B prompts.
        max_new_tokens (`int`):
            Longest completion.
        eos_token_ids (`list[int]`):
            What ends a completion.
        temperature (`float`):
            Divides the logits.

    Returns:
        `list[list[int]]`: B completions, up to and including the first EOS.
    """
    device = base_causal_lm(model).device
    eos = torch.tensor(eos_token_ids, device=device)
    drawn: dict[int, list[int]] = {}
    for rows in equal_length_groups([len(ids) for ids in prompt_ids]):
        ids = torch.tensor([list(prompt_ids[row]) for row in rows], device=device)  # (b, C)
        start = ids.size(1)
        for _ in range(max_new_tokens):
            logits = plain_logits(model, ids)[:, -1].float() / temperature  # (b, V)
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
            if torch.isin(ids[:, start:], eos).any(1).all():
                break
        kept = first_eos_mask(ids[:, start:], eos_token_ids)  # (b, t)
        drawn |= {row: own[keep].tolist() for row, own, keep in zip(rows, ids[:, start:], kept, strict=True)}
    return [drawn[row] for row in range(len(prompt_ids))]


def equal_length_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of equal length together: [2, 5, 2] to [[0, 2], [1]]."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(int(length), []).append(row)
    return list(groups.values())


@torch.no_grad()
def generates_what_it_scores(
    model: nn.Module,
    rows: list[Tensor],
    steps: int,
    tolerance: float,
    model_inputs: Sequence[RowInputs] | None = None,
) -> bool:
    """
    Whether `generate`, in a left-padded batch and with its cache, computes the logits of plain passes.

    Args:
        model (`nn.Module`):
            A causal LM, PEFT-wrapped or not, in evaluation mode.
        rows (`list[Tensor]`):
            Prompts (L,) of token ids.
        steps (`int`):
            Tokens to generate.
        tolerance (`float`):
            Nats by which log-probs may differ in the mean.
        model_inputs (`Sequence[RowInputs]`, *optional*):
            Inputs of the prompts besides their tokens.
    """
    inputs = [{} for _ in rows] if model_inputs is None else model_inputs
    lengths, device = [len(row) for row in rows], rows[0].device
    padded, mask = (
        nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side="left")
        for x in (rows, [torch.ones_like(row) for row in rows])
    )
    config = sampling_config(steps, [], 0, 1.0)
    config.do_sample, config.eos_token_id, config.output_logits = False, None, True
    config.return_dict_in_generate, config.min_new_tokens = True, steps
    config.suppress_tokens = list(excluded_tokens(base_causal_lm(model))) or None
    others = collated(inputs, lengths, max(lengths), 0, device)
    with raw_generation_config(model):
        try:
            output = model.generate(input_ids=padded, attention_mask=mask, generation_config=config, **others)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False  # it has no cache that `generate` knows
    drawn = output.sequences[:, padded.size(1) :]  # (B, T)
    for row, prompt in enumerate(rows):
        whole = torch.cat([prompt, drawn[row]])[None]
        own = collated(inputs[row : row + 1], lengths[row : row + 1], len(prompt), drawn.size(1), device)
        plain = plain_logits(model, whole, **own)[0, len(prompt) - 1 : -1].float().log_softmax(-1)  # (T, V)
        steps_of = torch.stack([logits[row] for logits in output.logits]).float().log_softmax(-1)
        index = drawn[row, :, None]
        if not disagreement(plain.gather(-1, index), steps_of.gather(-1, index)) <= tolerance:
            return False
    return True
