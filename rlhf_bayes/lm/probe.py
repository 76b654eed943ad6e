"""Log-probabilities of a few fixed rows of tokens, to find out whether two models are the same distribution."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_bayes.lm.adapters import base_causal_lm

_ROWS, _LENGTH = 3, 8


@torch.no_grad()
def probe_log_probs(model: nn.Module) -> Tensor:
    """
    log π(x_t | x_<t) of fixed rows of tokens, each run alone and without padding.

    Args:
        model (`nn.Module`):
            A causal LM, PEFT-wrapped or not, with whole weights. Its mode is restored.

    Returns:
        `Tensor` (R · (L − 1),): fp32, nats, on the CPU.
    """
    lm = base_causal_lm(model)
    # spread over the vocabulary, so that differences in some rows of the embeddings are found
    ids = torch.arange(_ROWS * _LENGTH, device=lm.device) * 7919 % lm.config.get_text_config().vocab_size
    picked = []
    with evaluating(model):
        for row in ids.view(_ROWS, 1, _LENGTH):
            log_probs = plain_logits(model, row)[:, :-1].float().log_softmax(-1)  # (1, L - 1, V)
            picked.append(log_probs.gather(-1, row[:, 1:, None]).flatten())
    return torch.cat(picked).cpu()


def plain_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The model's own logits at each token, (B, L, V), without those of virtual tokens before them."""
    outputs = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
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
