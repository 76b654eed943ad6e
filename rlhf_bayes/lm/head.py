"""From hidden states to token log-probabilities, entropies and exact KLs, without a (B, T, V) tensor."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from ..numerics import exact_token_kl

# 2**25 fp32 logits are 128 MiB: enough rows to keep a GPU busy, and independent of batch, length and vocabulary
MAX_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class LMHead:
    """
    The output projection of a causal LM, with what its family does to the logits afterwards.

        logits = softcap · tanh(scale · (W h + b) / softcap) / temperature

    Args:
        projection (`nn.Module`):
            The model's output embeddings, hidden states (N, H) to logits (N, V).
        vocab_size (`int`):
            V.
        scale (`float`):
            Multiplier of the logits (Cohere, Granite, Falcon-H1, …).
        softcap (`float`, *optional*):
            Final soft-capping (Gemma 2).
        temperature (`float`):
            Tempers the distribution: π ∝ π^(1/temperature) token by token.
    """

    projection: nn.Module
    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel, temperature: float = 1.0) -> "LMHead":
        """The head of a causal LM (unwrapped: no PEFT, no engine)."""
        config = model.config.get_text_config()
        return cls(
            projection=model.get_output_embeddings(),
            vocab_size=config.vocab_size,
            scale=_logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
            temperature=temperature,
        )

    def log_softmax(self, hidden: Tensor) -> Tensor:
        """Normalised token log-probabilities, fp32: (N, H) to (N, V), nats."""
        logits = self.projection(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits.log_softmax(-1)


def _logit_scale(config: PreTrainedConfig) -> float:
    # families disagree on the name, and on whether to multiply or to divide
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)


def token_log_probs_and_entropy(hidden: Tensor, targets: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
    """
    log π(target | prefix) and the entropy of π(· | prefix), both in nats, from hidden states in chunks.

    The log-probability carries a gradient (each chunk is recomputed in the backward pass when there is more than one);
    the entropy never does.

    Args:
        hidden (`Tensor` (N, H)):
            Hidden states of the positions that predict the targets.
        targets (`Tensor` (N,)):
            Token ids.
        head (`LMHead`):
            Output projection.

    Returns:
        Token log-probabilities (N,) and entropies (N,), fp32.
    """

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = head.log_softmax(hidden)  # (n, V)
        with torch.no_grad():
            entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)  # (n,)
        return log_p.gather(-1, targets[:, None]).squeeze(-1), entropy

    return _in_chunks(chunk, head, hidden, targets)


def token_log_probs_and_exact_kl(
    hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    log π(target), log π0(target), the entropy of π and the exact KL(π(· | prefix) ‖ π0(· | prefix)), without gradient.

    The sum of the exact token KLs over a completion drawn from π is the Rao-Blackwellised estimate of the sequence KL
    (Amini, Vieira & Cotterell 2025, arXiv 2504.10637, eq. 12): unbiased, no more variance than k1, never negative.

    Args:
        hidden, ref_hidden (`Tensor` (N, H)):
            Hidden states of π and of π0 at the positions that predict the targets.
        head, ref_head (`LMHead`):
            Their output projections.
        targets (`Tensor` (N,)):
            Token ids.

    Returns:
        Four tensors (N,), fp32, nats.
    """

    def chunk(hidden: Tensor, ref_hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        log_p, log_q = head.log_softmax(hidden), ref_head.log_softmax(ref_hidden)  # (n, V)
        entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)
        index = targets[:, None]
        return (
            log_p.gather(-1, index).squeeze(-1),
            log_q.gather(-1, index).squeeze(-1),
            entropy,
            exact_token_kl(log_p, log_q),
        )

    with torch.no_grad():
        return _in_chunks(chunk, head, hidden, ref_hidden, targets)


def _in_chunks(function: Callable[..., tuple[Tensor, ...]], head: LMHead, *tensors: Tensor) -> tuple[Tensor, ...]:
    rows = max(1, MAX_CHUNK_ELEMENTS // head.vocab_size)
    if len(tensors[0]) <= rows:
        return function(*tensors)
    recompute = torch.is_grad_enabled()
    parts = [
        checkpoint(function, *chunk, use_reentrant=False) if recompute else function(*chunk)
        for chunk in zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
