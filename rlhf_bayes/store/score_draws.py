"""Scores draws for a store: log-probabilities under the prior, and raw rewards and features."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_bayes.likelihoods import Likelihood, ProductLikelihood, RewardLikelihood, checked_evidence
from rlhf_bayes.lm import Completions, LanguageModel
from rlhf_bayes.rewards.scoring import distinct_names
from rlhf_bayes.store.provenance import Provenance
from rlhf_bayes.store.scored_completion import ScoredCompletion

LOG_LIKELIHOOD = "log_likelihood"
"""The feature that holds the nats of evidence which is made neither of rewards nor of features."""


def provenance_of(prior: LanguageModel, likelihood: Likelihood) -> Provenance:
    """
    The record of a store of draws that a prior and some evidence score.

    Args:
        prior ([`~rlhf_bayes.LanguageModel`]):
            π0.
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`]):
            The evidence: rewards, or a product of rewards with conditions and other parts.

    Raises:
        ValueError: if the evidence holds rewards twice.
    """
    parts = _parts(likelihood)
    rewards = [part for part in parts if isinstance(part, RewardLikelihood)]
    if len(rewards) > 1:
        raise ValueError(
            f"`likelihood` must hold one `RewardLikelihood` to be stored, got {len(rewards)}: both may have a "
            "function of the same name. Pass all functions to one of them, with `reward_weights`."
        )
    others = [part for part in parts if not isinstance(part, RewardLikelihood)]
    names = distinct_names(getattr(part, "name", type(part).__name__) for part in others)
    functions = rewards[0].reward_funcs if rewards else {}
    return Provenance.of(prior, functions, dict(zip(names, others, strict=True)))


def raw_scores(
    likelihood: Likelihood,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence] | None = None,
) -> tuple[dict[str, list], dict[str, list]]:
    """
    Rewards of each function and features by name, B values each, before β, weights, clipping and conditions.

    Args:
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`]): The evidence.
        prompts, completions (`Sequence` of `str` or of chats): B each.
        completion_ids (`Sequence[Sequence[int]]`): Token ids of the B completions.
        columns (`Mapping[str, Sequence]`, *optional*): Columns of the dataset, B entries each.
    """
    rows = (prompts, completions, completion_ids, columns)
    rewards: dict[str, list] = {}
    features: dict[str, list] = {}
    for part in _parts(likelihood):
        if isinstance(part, RewardLikelihood):
            values = part.rewards_per_func(*rows)  # (B, F)
            rewards = {name: _or_none(values[:, index]) for index, name in enumerate(part.reward_names)}
            continue
        evidence = checked_evidence(part, *rows)
        found = evidence.features or {LOG_LIKELIHOOD: evidence.log_likelihood}
        features |= {name: _or_none(column) for name, column in found.items()}
    return rewards, features


def scored_completions(
    drawn: Completions,
    prior: LanguageModel,
    likelihood: Likelihood,
    *,
    drawn_by: str = "prior",
    columns: Mapping[str, Sequence] | None = None,
    step: int | None = None,
) -> list[ScoredCompletion]:
    """
    Draws of a language model with their scores, for [`CompletionStore.append`].

    Args:
        drawn ([`~rlhf_bayes.lm.Completions`]):
            Completions of the prior, or of another model with the same support.
        prior ([`~rlhf_bayes.LanguageModel`]):
            π0, which scores them unless it drew them.
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`]):
            The evidence, whose rewards and features are stored.
        drawn_by (`str`, *optional*, defaults to `"prior"`):
            The name of what drew them.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of the dataset, an entry for each completion.
        step (`int`, *optional*):
            The optimizer step of the training that drew them.
    """
    log_proposal = drawn.log_proposal
    log_prior = drawn.log_prob if drawn_by == "prior" else prior.log_prob(drawn.prompts, drawn.completion_ids)
    rewards, features = raw_scores(likelihood, drawn.prompts, drawn.completions, drawn.completion_ids, columns)
    prompt_ids = prior.prompt_token_ids(drawn.prompts)
    return [
        ScoredCompletion(
            prompt=drawn.prompts[row],
            prompt_ids=prompt_ids[row],
            completion=drawn.texts[row],
            completion_ids=drawn.completion_ids[row],
            ended=bool(drawn.ended[row]),
            log_prior=float(log_prior[row]),
            log_proposal=float(log_proposal[row]),
            drawn_by=drawn_by,
            rewards={name: values[row] for name, values in rewards.items()},
            features={name: values[row] for name, values in features.items()},
            columns={name: values[row] for name, values in (columns or {}).items()},
            step=step,
        )
        for row in range(len(drawn))
    ]


def _parts(likelihood: Likelihood) -> list[Likelihood]:
    return likelihood.likelihoods if isinstance(likelihood, ProductLikelihood) else [likelihood]


def _or_none(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in torch.as_tensor(values).double().tolist()]
