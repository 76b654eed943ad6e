"""Completions that a language model drew, and the types of prompts and completions."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_bayes.notebook import Described
from rlhf_bayes.numerics.masked import masked_sum

Prompt = str | list[dict[str, Any]]
Completion = str | list[dict[str, Any]]


@dataclass(frozen=True, repr=False)
class Completions(Described):
    """Completions drawn from a [`LanguageModel`], one row each, grouped by prompt."""

    prompts: list[Prompt]
    """The prompt of each row: n rows of the first prompt, then n of the second, …"""
    completion_ids: list[list[int]]
    """Token ids up to and including the first EOS."""
    texts: list[str]
    """The decoded completions, without special tokens."""
    completions: list[Completion]
    """The completions as reward functions take them: a text, or one assistant message for a chat prompt."""
    mask: Tensor
    """(B, T) bool: the tokens of each completion."""
    token_log_probs: Tensor
    """(B, T) fp32, nats, 0 on padding: log π of each token."""
    ended: Tensor
    """(B,) bool: whether EOS was drawn; false for completions cut at `max_completion_length`."""
    engine_log_prob: Tensor | None = None
    """(B,) fp32, nats: log q of each completion by the engine that drew it; None where the model itself drew."""

    @property
    def log_prob(self) -> Tensor:
        """log π(x | prompt), (B,), nats: the sum over the completion's tokens."""
        return masked_sum(self.token_log_probs, self.mask, dim=-1)

    @property
    def log_proposal(self) -> Tensor:
        """log q(x | prompt) under what drew it, (B,), nats: an engine by its own log-probs, else the model."""
        return self.log_prob if self.engine_log_prob is None else self.engine_log_prob

    def _facts(self) -> dict[str, Any]:
        return {"rows": len(self), "ended": int(self.ended.sum()), "tokens": int(self.mask.sum())}

    def __len__(self) -> int:
        return len(self.completion_ids)
