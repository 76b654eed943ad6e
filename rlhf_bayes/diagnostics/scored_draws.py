"""Completions drawn from a policy or from the prior, with the scores that all estimates are computed from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rlhf_bayes.likelihoods import checked_evidence
from rlhf_bayes.lm import Completions, LanguageModel, Prompt, score_completions
from rlhf_bayes.lm.forward import base_causal_lm, scatter
from rlhf_bayes.lm.head import LMHead, token_log_probs_and_exact_kl
from rlhf_bayes.lm.language_model import pad_ids
from rlhf_bayes.lm.support import check_same_support
from rlhf_bayes.notebook import Described
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.samplers import Proposal
from rlhf_bayes.samplers.scored import check_columns, check_prompts, check_proposal

_ROWS_AT_ONCE = 1024  # rows between two updates of the progress bar


@dataclass(frozen=True, repr=False)
class ScoredDraws(Described):
    """
    Completions of P prompts, n each, drawn from one distribution q, the policy or the prior.

    Log-probabilities, evidence, KL and entropy are in nats per sequence, (P, n), on the CPU.
    """

    prompts: list[Prompt]
    """The P prompts."""
    completion_ids: list[list[list[int]]]
    """(P, n) completions: token ids up to and including the first EOS."""
    texts: list[list[str]]
    """(P, n) decoded completions."""
    log_prob: Tensor
    """log q(x | c)."""
    log_prior: Tensor
    """log π0(x | c)."""
    log_likelihood: Tensor
    """Evidence, r/β; `-inf` where it forbids the completion."""
    kl: Tensor
    """Σ_t KL(q(· | x_<t) ‖ π0(· | x_<t)), with exact terms; its mean estimates KL(q‖π0)."""
    entropy: Tensor
    """Σ_t of the entropy of q(· | x_<t), with exact terms; its mean estimates the entropy of q."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> (P, n): features of the completions, where the evidence reports them."""
    engine_log_prob: Tensor | None = None
    """(P, n): log-prob of each completion by the engine that drew it, where one did, nats."""

    def _facts(self) -> dict[str, Any]:
        prompts, each = self.log_prob.shape
        return {"prompts": prompts, "completions_each": each, "features": list(self.features) or None}

    @property
    def lengths(self) -> Tensor:
        """(P, n): number of tokens, EOS included."""
        return torch.tensor([[len(ids) for ids in rows] for rows in self.completion_ids])

    @property
    def log_correction(self) -> Tensor:
        """(P, n) fp64, nats: log q less log-prob by the engine that drew, 0 where q itself drew."""
        if self.engine_log_prob is None:
            return torch.zeros_like(self.log_prob, dtype=torch.float64)
        return self.log_prob.double() - self.engine_log_prob.double()

    @property
    def log_weights(self) -> Tensor:
        """(P, n) fp64, nats: log of the unnormalised posterior over q."""
        return self.log_prior.double() + self.log_likelihood.double() - self.log_prob.double()

    def rows(self, reward_scale: float | None) -> list[dict[str, Any]]:
        """
        A dictionary for each completion, for a file of JSON lines: `prompt`, `completion`, `reward` and `features`.

        Args:
            reward_scale (`float`, *optional*):
                Units of reward per nat of evidence, where the evidence is a reward.
        """
        return [
            {
                "prompt": prompt,
                "completion": text,
                "reward": None if reward_scale is None else reward_scale * self.log_likelihood[row, column].item(),
                "features": {name: values[row, column].item() for name, values in self.features.items()},
            }
            for row, prompt in enumerate(self.prompts)
            for column, text in enumerate(self.texts[row])
        ]

    def log_prob_under(self, other: Proposal) -> Tensor:
        """log π(x | c) of the same completions under another distribution: (P, n), nats."""
        n = self.log_prob.size(1)
        ids = [ids for rows in self.completion_ids for ids in rows]
        return other.log_prob([prompt for prompt in self.prompts for _ in range(n)], ids).cpu().view(-1, n)


def draw(
    source: Proposal,
    posterior: Posterior,
    prompts: Sequence[Prompt],
    n: int,
    generator: torch.Generator | None = None,
    columns: Mapping[str, Sequence] | None = None,
    show_progress: bool = False,
) -> ScoredDraws:
    """
    Draw n completions for each prompt and score them.

    Args:
        source (`LanguageModel` or [`~rlhf_bayes.samplers.Proposal`]):
            The distribution to draw from: a policy, or `posterior.prior`. A policy needs the prior's tokenizer and
            `max_completion_length`.
        posterior (`Posterior`):
            The posterior, whose prior and evidence score the draws.
        prompts (`Sequence` of `str` or of chat messages):
            P prompts.
        n (`int`):
            Completions for each prompt.
        generator (`torch.Generator`, *optional*):
            Makes the draws reproducible.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of the dataset that reward functions ask for, P entries each.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Raises:
        ValueError: if there are no prompts, a column does not have P entries, or the source draws completions of
            another support than the prior's.
        TypeError: if the source cannot be drawn from, for example a bare model.
    """
    _check(source, posterior, prompts, columns)
    parts: list[tuple[Completions, Tensor, dict[str, Tensor]]] = []
    at_once = max(1, _ROWS_AT_ONCE // n)
    with tqdm(total=len(prompts), desc="Drawing completions", unit="prompt", disable=not show_progress) as bar:
        for start in range(0, len(prompts), at_once):
            some = slice(start, start + at_once)
            drawn = source.sample(prompts[some], n, generator)
            rows = {name: [x for x in values[some] for _ in range(n)] for name, values in (columns or {}).items()}
            texts = (drawn.prompts, drawn.completions, drawn.completion_ids, rows)
            evidence, features = checked_evidence(posterior.likelihood, *texts)  # (B,)
            scores = torch.stack([*_score(source, posterior.prior, drawn), evidence.cpu()])
            parts.append((drawn, scores, features))
            bar.update(len(drawn) // n)
    by_engine = [drawn.engine_log_prob.cpu() for drawn, *_ in parts if drawn.engine_log_prob is not None]
    engine_log_prob = torch.cat(by_engine).view(-1, n) if by_engine else None
    log_prob, log_prior, kl, entropy, evidence = torch.cat([scores for _, scores, _ in parts], dim=1).view(5, -1, n)
    return ScoredDraws(
        prompts=list(prompts),
        completion_ids=_grouped([ids for drawn, *_ in parts for ids in drawn.completion_ids], n),
        texts=_grouped([text for drawn, *_ in parts for text in drawn.texts], n),
        log_prob=log_prob,
        log_prior=log_prior,
        log_likelihood=evidence,
        kl=kl,
        entropy=entropy,
        engine_log_prob=engine_log_prob,
        features={
            name: torch.cat([features[name].cpu() for *_, features in parts]).view(-1, n) for name in parts[0][2]
        },
    )


def _check(
    source: Any, posterior: Posterior, prompts: Sequence[Prompt], columns: Mapping[str, Sequence] | None
) -> None:
    check_proposal("policy", source)
    check_prompts(prompts)
    check_columns(columns, prompts)
    if isinstance(source, LanguageModel):
        check_same_support("policy", source, posterior.prior)


@torch.no_grad()
def _score(source: Proposal, prior: LanguageModel, drawn: Completions) -> list[Tensor]:
    """log q(x), log π0(x), and the summed token KLs and entropies of q: four of (B,), on the CPU."""
    if not isinstance(source, LanguageModel):
        # for a proposal that is not a language model, only log q is known
        log_prob = drawn.log_prob.cpu()
        log_prior = prior.log_prob(drawn.prompts, drawn.completion_ids).cpu()
        return [log_prob, log_prior, log_prob - log_prior, -log_prob]
    prompt_ids = source.prompt_token_ids(drawn.prompts)
    heads = [LMHead.of(base_causal_lm(lm.model), lm.temperature) for lm in (source, prior)]
    parts = []
    for start in range(0, len(drawn), source.batch_size):
        rows = slice(start, start + source.batch_size)
        prompts, prompt_mask = pad_ids(prompt_ids[rows], "left", source.device)  # (b, C)
        completions, mask = pad_ids(drawn.completion_ids[rows], "right", source.device)  # (b, T)
        batch = (prompts, prompt_mask, completions, mask)
        hidden = _hidden(source, batch)
        prior_hidden = hidden if source is prior else _hidden(prior, batch)
        log_q, log_p, entropy, kl = token_log_probs_and_exact_kl(
            hidden, heads[0], prior_hidden, heads[1], completions[mask]
        )
        parts.append(torch.stack([scatter(column, mask).sum(-1) for column in (log_q, log_p, kl, entropy)]).cpu())
    return list(torch.cat(parts, dim=1))


def _hidden(lm: LanguageModel, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Last hidden states before each of the N tokens: (N, H)."""
    return cast(Tensor, score_completions(lm.model, *batch, hidden_only=True, with_values=False).hidden)


def _grouped(rows: list, n: int) -> list[list]:
    return [rows[start : start + n] for start in range(0, len(rows), n)]
