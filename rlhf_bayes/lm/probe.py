"""Log-probabilities of a few fixed rows of tokens, to find out whether two models are the same distribution."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_bayes.lm.adapters import base_causal_lm

_ROWS, _LENGTH = 3, 8


def add_image_to_probe(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """
    Let [`probe_log_probs`] run a prompt with an image too: two models may differ only in how they read images.

    Args:
        model (`nn.Module`):
            A vision-language model, PEFT-wrapped or not. Copies of it inherit the prompt.
        inputs (`Mapping[str, Tensor]`):
            All inputs of its forward for one prompt, `input_ids` among them.
    """
    base_causal_lm(model)._probe_image = dict(inputs)


@torch.no_grad()
def probe_log_probs(model: nn.Module) -> Tensor:
    """
    log π(x_t | x_<t) of fixed rows of tokens, each run alone and without padding.

    A vision-language model also runs the prompt of [`add_image_to_probe`].

    Args:
        model (`nn.Module`):
            A causal LM, PEFT-wrapped or not, with whole weights. Its mode is restored.

    Returns:
        `Tensor` (N,): fp32, nats, on the CPU; N is the number of tokens that follow others.
    """
    lm = base_causal_lm(model)
    # spread over the vocabulary, so that differences in some rows of the embeddings are found
    ids = torch.arange(_ROWS * _LENGTH, device=lm.device) * 7919 % lm.config.get_text_config().vocab_size
    picked = []
    with evaluating(model):
        for row in ids.view(_ROWS, 1, _LENGTH):
            picked.append(_of_next_tokens(plain_logits(model, row), row))
        image = vars(lm).get("_probe_image")
        if image is not None:
            inputs = {name: tensor.to(lm.device) for name, tensor in image.items()}
            picked.append(_of_next_tokens(model(**inputs).logits, inputs["input_ids"]))
    return torch.cat(picked).cpu()


def _of_next_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits[:, -ids.size(1) : -1]  # without virtual tokens before the row
    return logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()


def plain_logits(model: nn.Module, input_ids: Tensor, **others: Tensor) -> Tensor:
    """The model's own logits at each token, (B, L, V), without those of virtual tokens before them."""
    outputs = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **others)
    return outputs.logits[:, -input_ids.size(1) :]


def disagreement(first: Tensor, second: Tensor) -> float:
    """Mean absolute difference of log-probs, nats; infinite where one is not a number."""
    difference = torch.where(first == second, 0.0, first - second).abs().mean().item()
    return difference if difference == difference else float("inf")


def rounding(model: nn.Module) -> float:
    """How far, in nats, log-probs of one model may differ between two ways to compute them."""
    return 1e-3 if base_causal_lm(model).dtype == torch.float32 else 0.1


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A context in which the module and its submodules are in evaluation mode."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
