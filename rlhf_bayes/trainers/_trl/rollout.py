"""What a rollout leaves for an objective to learn from."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
