"""How the completions of a rollout are scored, and by what their prompts are told apart."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_bayes.lm import score_completions
from rlhf_bayes.lm.forward import CompletionScores, scatter, token_places
from rlhf_bayes.lm.head import LMHead, token_log_probs_and_exact_kl
from rlhf_bayes.lm.model_inputs import RowInputs
from rlhf_bayes.trainers.rollout.reference import Reference


def prompt_key(row: Any) -> int:
    """A number that is the same for rows with equal columns, images among them, in every process and run."""
    # all columns count, since the evidence and so Z may depend on each
    text = json.dumps(row, sort_keys=True, default=_content)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _content(value: Any) -> str:
    """A text that is the same for equal values of types that JSON does not know."""
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # an image of PIL, whose `repr` is its address
        palette = value.getpalette() if value.mode == "P" else None
        return f"image {value.mode} {value.size} {palette} {_digest(value.tobytes())}"
    if isinstance(value, Tensor):
        value = (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
    if isinstance(value, np.ndarray):  # `repr` leaves out the middle of a long array
        return f"array {value.dtype} {value.shape} {_digest(np.ascontiguousarray(value).tobytes())}"
    return f"bytes {_digest(value)}" if isinstance(value, bytes) else repr(value)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@torch.no_grad()
def score_under_both(
    model: nn.Module,
    reference: Reference,
    sequences: tuple,
    heads: Callable[[nn.Module], AbstractContextManager[list[LMHead]]] | None,
    graph: AbstractContextManager | None = None,
    with_hidden: bool = False,
    model_inputs: Sequence[RowInputs] | None = None,
) -> tuple[CompletionScores, Tensor, Tensor | None]:
    """
    Score completions under policy and prior, by two forwards and one pass over the vocabulary.

    Args:
        model (`nn.Module`):
            The policy.
        reference ([`Reference`]):
            The prior.
        sequences (`tuple`):
            Arguments of [`~rlhf_bayes.lm.score_completions`], with the temperature.
        heads (`Callable`, *optional*):
            A context manager that takes the prior's module and yields the output projections of policy and prior.
            Without it, each model uses its own projection inside its forward, and there is no exact KL.
        graph (`AbstractContextManager`, *optional*):
            A context for the policy's forward in which gradients are enabled, so that its log-probs carry a gradient.
        with_hidden (`bool`, *optional*, defaults to `False`):
            Whether the policy's scores hold its hidden states.
        model_inputs (`Sequence[RowInputs]`, *optional*):
            Inputs of the prompts besides their tokens, as in [`~rlhf_bayes.lm.score_completions`].

    Returns:
        The policy's scores, and log-probs of the prior and exact KLs of each token, (B, T), nats, 0 on padding.
    """
    _, _, completion_ids, mask, _ = sequences
    options: dict[str, Any] = {"hidden_only": heads is not None, "model_inputs": model_inputs}
    with graph or nullcontext():
        policy = score_completions(model, *sequences, with_hidden=with_hidden, **options)
    with reference.active(model) as ref_model:
        ref = score_completions(ref_model, *sequences, with_values=False, **options)
    if heads is None:
        return policy, ref.log_probs, None
    with heads(ref_model) as (head, ref_head), torch.set_grad_enabled(graph is not None):
        targets = completion_ids.flatten().index_select(0, token_places(mask, len(policy.hidden)))  # (N,)
        columns = token_log_probs_and_exact_kl(policy.hidden, head, ref.hidden, ref_head, targets)
        log_probs, ref_log_probs, entropy, token_kl = (scatter(column, mask) for column in columns)
    hidden = policy.hidden if with_hidden else None
    return CompletionScores(log_probs, entropy, policy.values, hidden), ref_log_probs, token_kl


def scored_by_length(
    score_rows: Callable[..., dict[str, Tensor | None]],
    sequences: tuple[Tensor, ...],
    batch_size: int,
    model_inputs: Sequence[RowInputs] | None = None,
) -> dict[str, Tensor | None]:
    """
    What `score_rows` says of all rows, `batch_size` at a time, in the order in which they came.

    Args:
        score_rows (`Callable`):
            Given prompt_ids, prompt_mask, completion_ids, completion_mask and model inputs of some rows, columns of as
            many rows.
        sequences (`tuple[Tensor, ...]`):
            The four of all rows: (B, P), (B, P), (B, T), (B, T).
        batch_size (`int`):
            Rows at a time.
        model_inputs (`Sequence[RowInputs]`, *optional*):
            Inputs of all rows besides these.
    """
    _, prompt_mask, _, completion_mask = sequences
    order = torch.arange(len(prompt_mask), device=prompt_mask.device)
    if batch_size < len(order):
        order = (prompt_mask.sum(-1) + completion_mask.sum(-1)).argsort(stable=True)
    parts = []
    for rows in order.split(batch_size):
        others = None if model_inputs is None else [model_inputs[row] for row in rows.tolist()]
        parts.append(score_rows(*(tensor[rows] for tensor in sequences), others))
    back = order.argsort()
    return {
        name: None if parts[0][name] is None else torch.cat([part[name] for part in parts])[back] for name in parts[0]
    }
