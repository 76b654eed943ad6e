"""What a rollout leaves for an objective to learn from, and how it is scored."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_bayes.lm import score_completions
from rlhf_bayes.lm.forward import CompletionScores, scatter
from rlhf_bayes.lm.head import LMHead, token_log_probs_and_exact_kl
from rlhf_bayes.trainers.rollout.reference import Reference


@dataclass(frozen=True)
class Rollout:
    """
    One process's completions as they were drawn and scored, before anything is learnt from them.

    Log-probabilities are those of the policy and of the prior at the training temperature, in nats; padding is 0.
    """

    mask: Tensor
    """(B, T) bool: completion tokens, the first EOS included."""
    ended: Tensor
    """(B,) bool: whether EOS was drawn."""
    prompt_keys: Tensor
    """(B,) int64: equal for rows of the data that are equal in every column, and the same in every process and run."""
    token_log_probs: Tensor
    """(B, T): log π(x_t | prefix) under the policy as it is."""
    ref_token_log_probs: Tensor
    """(B, T): log π0(x_t | prefix)."""
    token_entropy: Tensor
    """(B, T): entropy of π(· | prefix)."""
    token_kl: Tensor | None
    """(B, T): exact KL(π(· | prefix) ‖ π0(· | prefix)); None where FSDP shards the weights."""
    values: Tensor | None
    """(B, T): the critic's value of each prefix, where the policy has a critic."""
    log_proposal: Tensor
    """(B,): log q(x | prompt) under what drew it; that of the policy, if it did."""
    rewards_per_func: Tensor
    """(B, F): what each reward function returned; nan for None, -inf where a completion is forbidden."""
    num_generations: int
    """Completions a prompt; rows of a prompt are neighbours in the batch of all processes."""


def prompt_key(row: dict[str, Any]) -> int:
    """The same number for rows that are equal in every column, in every process and run."""
    # the evidence, and with it Z, may depend on every column
    text = json.dumps(row, sort_keys=True, default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


@torch.no_grad()
def score_under_both(
    model: nn.Module,
    reference: Reference,
    sequences: tuple,
    heads: Callable[[nn.Module], AbstractContextManager[list[LMHead]]] | None,
    graph: AbstractContextManager | None = None,
) -> tuple[CompletionScores, Tensor, Tensor | None]:
    """
    Completions under policy and prior: two forwards, and one pass over the vocabulary.

    Args:
        model (`nn.Module`):
            The policy.
        reference ([`Reference`]):
            Of the prior.
        sequences (`tuple`):
            As [`~rlhf_bayes.lm.score_completions`] takes them, temperature included.
        heads (`Callable`, *optional*):
            Given the prior's module, within: the output projections of policy and prior. Without, each model uses its
            own inside its forward, and there is no exact KL.
        graph (`AbstractContextManager`, *optional*):
            Within: the policy's forward keeps what a backward pass needs, and its log-probs carry a gradient.

    Returns:
        The policy's scores, and log-probs of the prior and exact KLs of each token, (B, T), nats, 0 on padding.
    """
    _, _, completion_ids, mask, _ = sequences
    with graph or nullcontext():
        policy = score_completions(model, *sequences, hidden_only=heads is not None)
    with reference.active(model) as ref_model:
        ref = score_completions(ref_model, *sequences, hidden_only=heads is not None, with_values=False)
    if heads is None:
        return policy, ref.log_probs, None
    with heads(ref_model) as (head, ref_head), torch.set_grad_enabled(graph is not None):
        columns = token_log_probs_and_exact_kl(policy.hidden, head, ref.hidden, ref_head, completion_ids[mask])
        log_probs, ref_log_probs, entropy, token_kl = (scatter(column, mask) for column in columns)
    return CompletionScores(log_probs, entropy, policy.values, None), ref_log_probs, token_kl
