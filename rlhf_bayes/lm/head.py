"""Token log-probabilities, entropies and exact KLs from hidden states, without a (B, T, V) tensor."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

# a chunk of 2**22 fp32 logits takes 16 MiB, for any batch, length and vocabulary
MAX_CHUNK_ELEMENTS = 2**22
# with fewer rows than this share of H, reading the head's weights would take longer than the computation; such a chunk
# takes an eighth of the memory of these weights in bf16
_MIN_ROWS_OF_HIDDEN = 1 / 16
# a head that learns also gets a gradient from each chunk, as large as its weights; the logits take a quarter of that
_MIN_ROWS_OF_HIDDEN_LEARNING = 1 / 4


@dataclass(frozen=True)
class LMHead:
    """
    The output projection of a causal LM, with the scaling and capping of logits of its family.

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
            Divides the logits: π ∝ π^(1/temperature) for each token.
        excluded (`tuple[int, ...]`):
            Tokens of probability 0: see [`exclude_tokens`].
    """

    projection: nn.Module
    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    excluded: tuple[int, ...] = ()

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
            excluded=excluded_tokens(model),
        )

    @property
    def frozen(self) -> bool:
        """Whether no weight of the projection is trained."""
        return not any(weight.requires_grad for weight in self.projection.parameters())

    @property
    def parted(self) -> bool:
        """Whether ZeRO-3 or FSDP shards the weights over processes."""
        # FSDP2 is recognised by a method that it adds to a module, since torch 2.5 does not export its class
        return hasattr(self.projection, "unshard") or any(
            hasattr(weight, "ds_id") for weight in self.projection.parameters()
        )

    def log_softmax(self, hidden: Tensor) -> Tensor:
        """Normalised token log-probabilities, fp32, nats: (N, H) -> (N, V)."""
        logits = self.projection(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.excluded:
            logits = logits.index_fill(-1, torch.tensor(self.excluded, device=logits.device), -torch.inf)
        return logits.log_softmax(-1)


def exclude_tokens(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    """
    Give tokens the probability 0 wherever completions of the model are scored; `generate` must suppress them too.

    A vision-language model cannot read a completion with the token that stands for a part of an image.

    Args:
        model (`PreTrainedModel`):
            A causal LM (unwrapped: no PEFT, no engine).
        tokens (`Sequence[int]`):
            Their ids.
    """
    model._excluded_tokens = tuple(tokens)


def excluded_tokens(model: nn.Module) -> tuple[int, ...]:
    """The tokens that [`exclude_tokens`] excluded from completions of a causal LM."""
    return vars(model).get("_excluded_tokens", ())


def _logit_scale(config: PreTrainedConfig) -> float:
    # model families differ in the name, and in whether they multiply or divide
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

    The log-probability carries a gradient, the entropy never does.

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
    return _differentiable(partial(_log_probs_and_entropy, head), head, hidden, targets)


def _log_probs_and_entropy(head: LMHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = head.log_softmax(hidden)  # (n, V)
    log_probs = log_p.gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():
        return log_probs, -_dot(log_p, log_p.exp())


def token_log_probs_and_exact_kl(
    hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    log π(target), log π0(target), the entropy of π and the exact KL(π(· | prefix) ‖ π0(· | prefix)).

    The first carries a gradient, the others never do.

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
    return _differentiable(partial(_log_probs_and_exact_kl, head, ref_head), head, hidden, ref_hidden, targets)


def _log_probs_and_exact_kl(
    head: LMHead, ref_head: LMHead, hidden: Tensor, ref_hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p = head.log_softmax(hidden)  # (n, V)
    log_probs = log_p.gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():
        log_q = ref_head.log_softmax(ref_hidden)
        ref_log_probs = log_q.gather(-1, targets[:, None]).squeeze(-1)
        p = log_p.exp()
        kl = -_dot(p, log_q.sub_(log_p))
        return log_probs, ref_log_probs, -_dot(log_p, p), kl


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of rows, with 0 · inf = 0: two (n, V) -> (n,). Overwrites `b`, to save a third (n, V)."""
    return b.mul_(a).nansum(-1)


def _differentiable(
    function: Callable[..., tuple[Tensor, ...]], head: LMHead, hidden: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """Apply a function to rows in chunks. The first of its results is log π(target), which carries a gradient."""
    # neither ZeRO-3 nor FSDP expects a backward pass within the forward
    if torch.is_grad_enabled() and hidden.requires_grad and head.frozen and not head.parted:
        return _UnderFrozenHead.apply(function, head, hidden, *others)
    return _in_chunks(function, head, hidden, *others)


class _UnderFrozenHead(torch.autograd.Function):
    """
    The same where the gradient ends at the hidden states, as it does when the head is frozen.

    The forward pass computes ∂ log π(target_i) / ∂ h_i, which is as large as h, together with each chunk. So the
    backward pass needs no logits, neither kept nor computed again.
    """

    @staticmethod
    def forward(ctx, function, head: LMHead, hidden: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        def chunk(hidden: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                log_probs, *columns = function(hidden, *others)
                (slopes,) = torch.autograd.grad(log_probs.sum(), hidden)
            return slopes, log_probs.detach(), *columns

        slopes, log_probs, *columns = _in_chunks(chunk, head, hidden, *others)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(*columns)
        return log_probs, *columns

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        others = (None,) * (len(ctx.needs_input_grad) - 3)
        return None, None, (gradient[:, None] * slopes).to(slopes.dtype), *others


def _in_chunks(function: Callable[..., tuple[Tensor, ...]], head: LMHead, *tensors: Tensor) -> tuple[Tensor, ...]:
    num_chunks = _num_chunks(head, tensors[0])
    if num_chunks == 1:
        return function(*tensors)
    recompute = torch.is_grad_enabled()
    parts = [
        checkpoint(function, *chunk, use_reentrant=False) if recompute else function(*chunk)
        for chunk in zip(*(tensor.tensor_split(num_chunks) for tensor in tensors), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _num_chunks(head: LMHead, hidden: Tensor) -> int:
    tokens, hidden_size = hidden.shape
    learns = torch.is_grad_enabled() and not head.frozen
    num_chunks = max(1, math.ceil(tokens / chunk_rows(head.vocab_size, hidden_size, learns)))
    if head.parted:
        # each use gathers the weights from all processes, so a process with fewer tokens must use them as often
        most = torch.tensor(num_chunks, device=hidden.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        num_chunks = int(most)
    return num_chunks


def chunk_rows(vocab_size: int, hidden_size: int, learns: bool) -> int:
    """Rows of logits in a chunk; `learns` says whether the head's weights get a gradient from them."""
    share = _MIN_ROWS_OF_HIDDEN_LEARNING if learns else _MIN_ROWS_OF_HIDDEN
    return max(1, MAX_CHUNK_ELEMENTS // vocab_size, int(hidden_size * share))
