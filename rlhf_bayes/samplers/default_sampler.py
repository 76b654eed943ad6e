"""The sampler of `posterior.sample`: rejection where a bound on the evidence is known, else importance resampling."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rlhf_bayes.lm import Prompt
from rlhf_bayes.samplers.draws import Draws, checks_in_words
from rlhf_bayes.samplers.importance import ImportanceSampler
from rlhf_bayes.samplers.rejection import RejectionSampler
from rlhf_bayes.samplers.scored import check_count

if TYPE_CHECKING:
    from rlhf_bayes.posterior import Posterior

CANDIDATES_PER_DRAW = 16
"""Completions of the prior that are drawn for each one that importance resampling returns."""
MIN_CANDIDATES = 256
"""At least so many are drawn for each prompt: the weights of few say nothing about the posterior."""


def draw_from_posterior(
    posterior: "Posterior",
    prompts: Sequence[Prompt],
    n: int,
    generator: torch.Generator | None = None,
    columns: Mapping[str, Sequence] | None = None,
) -> Draws:
    """
    n completions of each prompt, of equal weight, from draws of the prior.

    Where the posterior knows a bound on its evidence, they are exact: a [`RejectionSampler`] draws them. A prompt gets
    fewer than n, with a warning, if most completions are rejected. Otherwise they are consistent: an
    [`ImportanceSampler`] resamples them from 16·n candidates, at least 256. A warning says where these are too few.
    `info["sampler"]` is `"rejection"` or `"importance"`.

    Args:
        posterior ([`~rlhf_bayes.Posterior`]):
            The posterior to draw from.
        prompts, n, generator, columns:
            As in [`Sampler.sample`].

    Raises:
        `ValueError`: if no draw of any prompt is allowed by the posterior, or as in [`checked_request`].
    """
    check_count("n", n)
    if posterior.bound is not None:
        sampler = RejectionSampler()
        draws = sampler.sample(posterior, prompts, n, generator, columns)
        few = draws.counts < n
        if bool(few.any()):
            warnings.warn(
                f"{int(few.sum())} of {len(prompts)} prompts have fewer than {n} draws, the fewest "
                f"{int(draws.counts.min())}: no more of {sampler.max_draws:,} completions of the prior were accepted. "
                "Pass a larger `max_draws` to `RejectionSampler`, or use `MetropolisHastings`.",
                stacklevel=3,
            )
        return _named(draws, "rejection")
    candidates = max(MIN_CANDIDATES, CANDIDATES_PER_DRAW * n)
    draws = ImportanceSampler(num_candidates=candidates).sample(posterior, prompts, n, generator, columns)
    doubtful = draws.info["trustworthy"].count(False)
    if doubtful:
        warnings.warn(
            f"For {doubtful} of {len(prompts)} prompts the draws cannot be trusted: the posterior is too far from the "
            f"prior for {candidates} candidates ({checks_in_words(draws.info)}). Use `MetropolisHastings`, a proposal "
            "trained towards this posterior, or evidence with a bound (`reward_clip_range`), which makes draws exact.",
            stacklevel=3,
        )
    return _named(draws, "importance")


def _named(draws: Draws, sampler: str) -> Draws:
    return replace(draws, info={**draws.info, "sampler": sampler})
