"""How the completions of a rollout are scored, and by what their prompts are told apart."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_bayes.lm import score_completions
from rlhf_bayes.lm.forward import CompletionScores, scatter
from rlhf_bayes.lm.head import LMHead, token_log_probs_and_exact_kl
from rlhf_bayes.trainers.rollout.reference import Reference


def prompt_key(row: dict[str, Any]) -> int:
    """A number that is the same for rows with equal columns, in every process and run."""
    # all columns count, since the evidence and so Z may depend on each
    text = json.dumps(row, sort_keys=True, default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


@torch.no_grad()
def score_under_both(
    model: nn.Module,
    reference: Reference,
    sequences: tuple,
    heads: Callable[[nn.Module], AbstractContextManager[list[LMHead]]] | None,
    graph: AbstractContextManager | None = None,
    with_hidden: bool = False,
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

    Returns:
        The policy's scores, and log-probs of the prior and exact KLs of each token, (B, T), nats, 0 on padding.
    """
    _, _, completion_ids, mask, _ = sequences
    with graph or nullcontext():
        policy = score_completions(model, *sequences, hidden_only=heads is not None, with_hidden=with_hidden)
    with reference.active(model) as ref_model:
        ref = score_completions(ref_model, *sequences, hidden_only=heads is not None, with_values=False)
    if heads is None:
        return policy, ref.log_probs, None
    with heads(ref_model) as (head, ref_head), torch.set_grad_enabled(graph is not None):
        columns = token_log_probs_and_exact_kl(policy.hidden, head, ref.hidden, ref_head, completion_ids[mask])
        log_probs, ref_log_probs, entropy, token_kl = (scatter(column, mask) for column in columns)
    hidden = policy.hidden if with_hidden else None
    return CompletionScores(log_probs, entropy, policy.values, hidden), ref_log_probs, token_kl


def scored_by_length(
    score_rows: Callable[..., dict[str, Tensor | None]], sequences: tuple[Tensor, ...], batch_size: int
) -> dict[str, Tensor | None]:
    """
    What `score_rows` says of all rows, `batch_size` at a time, in the order in which they came.

    Args:
        score_rows (`Callable`):
            Given prompt_ids, prompt_mask, completion_ids and completion_mask of some rows, columns of as many rows.
        sequences (`tuple[Tensor, ...]`):
            The four of all rows: (B, P), (B, P), (B, T), (B, T).
        batch_size (`int`):
            Rows at a time.
    """
    _, prompt_mask, _, completion_mask = sequences
    order = torch.arange(len(prompt_mask), device=prompt_mask.device)
    if batch_size < len(order):
        order = (prompt_mask.sum(-1) + completion_mask.sum(-1)).argsort(stable=True)
    parts = [score_rows(*(tensor[rows] for tensor in sequences)) for rows in order.split(batch_size)]
    back = order.argsort()
    return {
        name: None if parts[0][name] is None else torch.cat([part[name] for part in parts])[back] for name in parts[0]
    }
