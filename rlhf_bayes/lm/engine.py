"""What an engine such as vLLM draws, with its own log-probs: checked before anything relies on it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_MISMATCH = 3.0
"""KL(q‖π), nats per sequence, beyond which an engine counts as one with other weights: 1 completion in 400 counts."""
NOTABLE_ESS = 0.9
"""Effective sample size of the weights π/q, as a share of the completions, below which a warning says so."""


class EngineError(RuntimeError):
    """An engine stopped, or returned something else than a completion with log-probs for each request."""

    drawn: Sequence[Sequence[int]] = ()
    """Token ids of the completions that were drawn before, in the order of the rows, where they are known."""


class EngineRows(NamedTuple):
    """B completions that an engine drew."""

    completion_ids: list[list[int]]
    """Token ids up to and including the first EOS."""
    token_log_probs: list[list[float]]
    """The engine's log-prob of each of these tokens, nats."""


class Mismatch(NamedTuple):
    """How far an engine's distribution q is from the policy π whose weights it holds: () each."""

    kl: Tensor
    """Estimate of KL(q‖π), nats per sequence; never negative."""
    ess: Tensor
    """Effective sample size of the weights π/q, as a share of the completions: 1 where q is π."""


def engine_rows(
    name: str,
    completion_ids: Sequence[Sequence[int]],
    token_log_probs: Sequence[Sequence[float | None]],
    num_requests: int,
    eos_token_ids: Sequence[int],
    max_completion_length: int,
) -> EngineRows:
    """
    What an engine returned, with each completion cut after its first EOS.

    Args:
        name (`str`):
            Of the engine, for messages.
        completion_ids (`Sequence[Sequence[int]]`):
            Token ids of each completion.
        token_log_probs (`Sequence[Sequence[float]]`):
            The engine's log-prob of each token, nats.
        num_requests (`int`):
            Completions that were asked for.
        eos_token_ids (`Sequence[int]`):
            What ends a completion.
        max_completion_length (`int`):
            Longest completion, in tokens.

    Raises:
        EngineError: if completions are missing, one is no completion, or a log-prob is missing or no number.
    """
    check_count(name, len(completion_ids), num_requests)
    rows = EngineRows([], [])
    eos = set(eos_token_ids)
    for row, (ids, log_probs) in enumerate(zip(completion_ids, token_log_probs, strict=True)):
        length = next((position + 1 for position, token in enumerate(ids) if token in eos), len(ids))
        kept = list(ids[:length])
        if not kept or (kept[-1] not in eos and length != max_completion_length):
            raise EngineError(
                f"{name} must draw up to an EOS or {max_completion_length} tokens, but completion {row} has {length} "
                f"tokens without EOS (EOS: {sorted(eos)}). Leave room for prompt and completion in its "
                "`max_model_len`, and let nothing but these tokens end a completion."
            )
        own = [math.nan if value is None else value for value in log_probs[:length]]
        if len(own) != length or not all(value <= _ROUNDING for value in own):
            raise EngineError(
                f"{name} must return a log-prob for each token, got {own[:8]} for the {length} tokens of completion "
                f"{row}: weights would be no numbers. nan comes of weights that are not finite, or of an overflow in "
                "half precision."
            )
        rows.completion_ids.append(kept)
        rows.token_log_probs.append(own)
    return rows


def check_count(name: str, count: int, num_requests: int) -> None:
    """Raise EngineError unless an engine of this name returned as many completions as were asked for."""
    if count != num_requests:
        raise EngineError(
            f"{name} must return a completion for each of {num_requests} requests, got {count}: it has stopped on the "
            "way. See its own messages above; with less to draw at once it may have enough memory."
        )


_ROUNDING = 1e-3  # nats by which rounding may put a log-prob above 0


def check_room(name: str, prompt_lengths: Sequence[int], max_completion_length: int, max_model_len: int) -> None:
    """
    Refuse prompts after which an engine would cut completions.

    Args:
        name (`str`):
            Of the setting or the engine that has the limit, for the message.
        prompt_lengths (`Sequence[int]`):
            Tokens of each prompt.
        max_completion_length (`int`):
            Longest completion, in tokens.
        max_model_len (`int`):
            Longest sequence, prompt and completion, that the engine takes.

    Raises:
        ValueError: if prompt and completion of a row exceed it.
    """
    longest = max(prompt_lengths)
    if longest + max_completion_length > max_model_len:
        raise ValueError(
            f"{name} must be at least the longest prompt plus `max_completion_length`, {longest} + "
            f"{max_completion_length} tokens, got {max_model_len}: completions would be cut, which are then no draws "
            "of the model. Raise it, shorten the prompts, or lower `max_completion_length`."
        )


def mismatch(log_policy: Tensor, log_proposal: Tensor) -> Mismatch:
    r"""
    How far an engine's distribution q is from the policy, from completions that the engine drew.

        KL(q‖π) = E_q[w − 1 − log w],    ESS = (Σ w)²/(n·Σ w²),    w = π/q

    Args:
        log_policy, log_proposal (`Tensor` (n,)):
            log π as the trainer scores it, and log q as the engine returned it, nats.

    Source: the estimator of the KL is k3 of Schulman 2020, "Approximating KL divergence".
    """
    log_weights = (log_policy - log_proposal).double()
    kl = (log_weights.exp() - 1 - log_weights).mean()
    share = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp() / len(log_weights)
    return Mismatch(kl, share)


def row_sums(token_log_probs: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """The log-prob of each completion, from those of its tokens: (B,) fp32, nats."""
    return torch.tensor([math.fsum(row) for row in token_log_probs], device=device)
