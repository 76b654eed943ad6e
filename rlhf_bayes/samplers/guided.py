"""Weighted decoding as a proposal: each token is drawn by prior and value, and the density is exact."""

from collections.abc import Sequence
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from rlhf_bayes.lm import Completions, LanguageModel, Prompt
from rlhf_bayes.lm.decoding import Decoding, draw_tokens, generator_on, joined
from rlhf_bayes.samplers.scored import check_count, check_prompts
from rlhf_bayes.samplers.values import Value, checked_log_value, checked_next_log_values


@runtime_checkable
class StepwiseProposal(Protocol):
    """A [`Proposal`] that changes a language model's next-token probabilities, so that SMC can use it per token."""

    prior: LanguageModel
    """The language model that is guided."""

    def next_log_probs(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], log_prior: Tensor
    ) -> Tensor:
        """log q of each next token of B prefixes of one length: (B, V), nats, given the model's own, (B, V)."""
        ...


@final
class GuidedProposal:
    r"""
    A proposal that decodes guided by a value.

        q(x_t | x_<t)  ∝  π0(x_t | x_<t) · exp(scale · log_value(x_≤t))

    Its density is known, so importance sampling, rejection, Metropolis–Hastings and SMC can correct for it. With the
    soft value of the posterior, all tokens as candidates and scale 1, it *is* the posterior.

    With fewer candidates than tokens, values are computed for the most probable tokens only. Their common prior mass
    is redistributed among them by the value; all other tokens keep their prior probability. If the value is `-inf` for
    every candidate, the step uses the prior.

    Args:
        prior ([`~rlhf_bayes.LanguageModel`]):
            π0, or another model to guide, for instance a trained policy.
        value (`Value`):
            [`ExpertsValue`], [`HeadValue`], [`CriticValue`], [`PrefixValue`], or your own.
        scale (`float`):
            Factor of the value, positive.
        num_candidates (`int`, *optional*):
            Number of tokens, the most probable ones, whose value is computed at each step; each is an evaluation.
            Default: all. With a value that has `next_log_values`, always all.

    Raises:
        ValueError: if a number is out of range.
        TypeError: if `value` has no `log_value`.
    """

    def __init__(self, prior: LanguageModel, value: Value, scale: float = 1.0, num_candidates: int | None = None):
        if not isinstance(value, Value):
            raise TypeError(f"`value` must have a method `log_value`, got {type(value).__name__}.")
        if not 0 < scale < float("inf"):
            raise ValueError(f"`scale` must be positive and finite, got {scale}: without a value, use the prior.")
        if num_candidates is not None and num_candidates < 2:
            raise ValueError(
                f"`num_candidates` must be at least 2, got {num_candidates}: one alone keeps its prior probability."
            )
        self.prior = prior
        self.value = value
        self.scale = scale
        self.num_candidates = num_candidates

    def sample(self, prompts: Sequence[Prompt], n: int = 1, generator: torch.Generator | None = None) -> Completions:
        """n completions for each of P prompts, P · n rows; their `token_log_probs` are those of q."""
        return sample_stepwise(self, prompts, n, generator)

    def log_prob(self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """
        log q of each completion: (B,), nats.

        Raises:
            ValueError: if ids are not a whole completion.
        """
        return score_stepwise(self, prompts, completion_ids)

    def next_log_probs(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], log_prior: Tensor
    ) -> Tensor:
        """log q of each next token: (B, V), nats, given log π0 of each, (B, V)."""
        if hasattr(self.value, "next_log_values"):
            log_values = checked_next_log_values(self.value, prompts, prefixes).to(log_prior.device)
            return _tilted(log_prior, self.scale * log_values)
        k = min(self.num_candidates or log_prior.size(1), log_prior.size(1))
        candidates = log_prior.topk(k).indices  # (B, K)
        children = [
            [*prefix, token] for prefix, tokens in zip(prefixes, candidates.tolist(), strict=True) for token in tokens
        ]
        log_values = checked_log_value(self.value, [prompt for prompt in prompts for _ in range(k)], children)
        log_values = log_values.to(log_prior).view(-1, k)
        among = log_prior.gather(1, candidates)  # (B, K)
        tilted = _tilted(among, self.scale * log_values)
        # the candidates keep their common mass under the prior
        shared = tilted - tilted.logsumexp(1, keepdim=True) + among.logsumexp(1, keepdim=True)
        return log_prior.scatter(1, candidates, shared)


@torch.no_grad()
def sample_stepwise(
    proposal: StepwiseProposal, prompts: Sequence[Prompt], n: int, generator: torch.Generator | None
) -> Completions:
    """
    n completions for each of P prompts, drawn token by token: P · n rows with their log q.

    Args:
        proposal ([`StepwiseProposal`]):
            q.
        prompts (`Sequence` of `str` or of chats):
            P prompts.
        n (`int`):
            Completions for each prompt.
        generator (`torch.Generator`, *optional*):
            Makes the draws reproducible.
    """
    check_prompts(prompts)
    check_count("n", n)
    generator = generator_on(proposal.prior.device, generator)
    rows = [prompt for prompt in prompts for _ in range(n)]
    size = proposal.prior.batch_size
    return joined([_decoded(proposal, rows[s : s + size], None, generator) for s in range(0, len(rows), size)])


@torch.no_grad()
def score_stepwise(
    proposal: StepwiseProposal, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]
) -> Tensor:
    """log q of each completion, computed by the loop that draws: (B,), nats."""
    if len(prompts) != len(completion_ids):
        raise ValueError(
            f"`prompts` and `completion_ids` must have one entry a row, got {len(prompts)} and {len(completion_ids)}."
        )
    size = proposal.prior.batch_size
    starts = range(0, len(prompts), size)
    parts = [_decoded(proposal, prompts[s : s + size], completion_ids[s : s + size], None) for s in starts]
    return torch.cat([part.log_prob for part in parts])


def _decoded(
    proposal: StepwiseProposal,
    prompts: Sequence[Prompt],
    forced: Sequence[Sequence[int]] | None,
    generator: torch.Generator | None,
) -> Completions:
    prior = proposal.prior
    decoding = Decoding(prior, prompts)
    token_log_probs = torch.zeros(len(prompts), prior.max_completion_length, device=prior.device)
    while decoding.rows.numel():
        rows, step = decoding.rows, decoding.length
        own_prompts = [decoding.prompts[row] for row in rows.tolist()]
        log_q = proposal.next_log_probs(own_prompts, decoding.token_ids(rows), decoding.log_probs)  # (A, V)
        tokens = draw_tokens(log_q, generator) if forced is None else next_tokens(forced, rows, step)
        token_log_probs[rows, step] = log_q.gather(1, tokens[:, None]).squeeze(1)
        decoding.append(tokens)
    drawn = decoding.completions(token_log_probs)
    if forced is not None:
        check_whole(forced, drawn.completion_ids)
    return drawn


def next_tokens(forced: Sequence[Sequence[int]], rows: Tensor, step: int) -> Tensor:
    """
    Token `step` of the given completions in these rows: (A,).

    Raises:
        ValueError: if a completion stops without EOS before the longest one.
    """
    for row in rows.tolist():
        if len(forced[row]) <= step:
            raise ValueError(
                f"`completion_ids` must hold tokens up to and including the first EOS, or `max_completion_length` "
                f"tokens; row {row} stops after {len(forced[row])} tokens without EOS: it is a prefix."
            )
    return torch.tensor([int(forced[row][step]) for row in rows.tolist()], device=rows.device)


def check_whole(forced: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if given completions go on after their end."""
    for row, (given, ids) in enumerate(zip(forced, written, strict=True)):
        if len(given) != len(ids):
            raise ValueError(
                f"`completion_ids` must hold tokens up to and including the first EOS, or `max_completion_length` "
                f"tokens; row {row} has {len(given)} tokens and ends after {len(ids)}."
            )


def _tilted(log_prior: Tensor, log_values: Tensor) -> Tensor:
    """The normalised product of prior and exp(value): (B, K); the prior where every product is 0."""
    tilted = log_prior + log_values
    hopeless = tilted.logsumexp(1, keepdim=True) == -torch.inf
    return torch.where(hopeless, log_prior, tilted).log_softmax(1)
