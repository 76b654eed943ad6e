"""Completions from a proposal with their log-weights, which importance and rejection sampling share.

Here are also the checks that every sampler makes of its arguments.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from scipy.stats import norm
from torch import Tensor

from rlhf_bayes.lm import Completion, Completions, LanguageModel, Prompt
from rlhf_bayes.lm.support import check_same_support
from rlhf_bayes.numerics import log_z, log_z_standard_error
from rlhf_bayes.samplers.dependence import Dependence
from rlhf_bayes.samplers.draws import Draws, Guarantee, LogZ
from rlhf_bayes.samplers.protocol import Proposal

if TYPE_CHECKING:
    from rlhf_bayes.posterior import Posterior


class Row(NamedTuple):
    """One completion, as [`Draws`] holds it."""

    prompt_index: int
    prompt: Prompt
    completion_ids: list[int]
    text: str
    completion: Completion


@dataclass(frozen=True)
class ScoredCompletions:
    """B completions drawn from a proposal, grouped by prompt, with evidence and log-weights in fp64, CPU, nats."""

    drawn: Completions
    prompt_index: Tensor
    """(B,): index of each completion's prompt."""
    log_likelihood: Tensor
    """(B,): evidence."""
    log_weights: Tensor
    """(B,): log π0 + log_likelihood − log q."""

    def row(self, index: int) -> Row:
        """One completion."""
        drawn = self.drawn
        return Row(
            int(self.prompt_index[index]),
            drawn.prompts[index],
            drawn.completion_ids[index],
            drawn.texts[index],
            drawn.completions[index],
        )

    @property
    def tokens(self) -> int:
        """The number of completion tokens drawn."""
        return sum(map(len, self.drawn.completion_ids))


def draw_scored(
    posterior: "Posterior",
    proposal: Proposal,
    prompts: Sequence[Prompt],
    counts: Sequence[int],
    generator: torch.Generator | None,
    columns: Mapping[str, Sequence] | None,
) -> ScoredCompletions:
    """
    Draw `counts[p]` completions of each prompt p, and weigh them.

    Args:
        posterior, proposal, prompts, generator, columns:
            As in [`Sampler.sample`], checked by [`checked_request`].
        counts (`Sequence[int]`):
            P counts, not all 0.
    """
    if len(set(counts)) == 1:  # in one call, so that a guided proposal reads each prompt once
        drawn = proposal.sample(prompts, counts[0], generator)
    else:
        drawn = proposal.sample(
            [p for p, count in zip(prompts, counts, strict=True) for _ in range(count)], 1, generator
        )
    prompt_index = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(list(counts)))
    evidence, log_weights = weighed(posterior, proposal, drawn, prompt_index.tolist(), columns, drawn.log_proposal)
    if proposal is posterior.prior and drawn.engine_log_prob is not None:
        # the engine's q is the prior but for its own arithmetic
        log_weights = log_weights + (drawn.log_prob - drawn.engine_log_prob).double().cpu()
    return ScoredCompletions(drawn, prompt_index, evidence, log_weights)


def weighed(
    posterior: "Posterior",
    proposal: Proposal,
    drawn: Completions | Draws,
    prompt_index: Sequence[int],
    columns: Mapping[str, Sequence] | None,
    log_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    log_likelihood and log π0 + log_likelihood − log q of completions, two of (B,), fp64, on the CPU.

    Args:
        posterior, proposal, columns:
            As in [`Sampler.sample`].
        drawn (`Completions` or `Draws`):
            B completions.
        prompt_index (`Sequence[int]`):
            Index of the prompt of each completion.
        log_q (`torch.Tensor`, *optional*):
            (B,), nats, if it is known. Default: the proposal computes it.
    """
    rows = {name: [values[p] for p in prompt_index] for name, values in (columns or {}).items()}
    evidence = posterior.log_likelihood(drawn.prompts, drawn.completions, drawn.completion_ids, rows).double().cpu()
    allowed = (
        (evidence > -torch.inf).nonzero().flatten().tolist()
    )  # forbidden completions have weight 0, whatever their density
    if proposal is posterior.prior or not allowed:
        return evidence, evidence
    prompts, ids = ([column[row] for row in allowed] for column in (drawn.prompts, drawn.completion_ids))
    log_q = proposal.log_prob(prompts, ids) if log_q is None else log_q[allowed]
    log_weights = evidence.clone()
    log_weights[allowed] += posterior.prior.log_prob(prompts, ids).double().cpu() - log_q.double().cpu()
    return evidence, log_weights


def importance_log_z(log_weights: Sequence[Tensor], confidence: float) -> LogZ:
    """
    log Z of each prompt from its log-weights, with the normal interval on the log scale.

    The interval has no bound where no weight is positive or there is only one draw.

    Args:
        log_weights (`Sequence[torch.Tensor]`):
            P tensors (n_p,), nats: the log-weights of all draws from the proposal.
        confidence (`float`):
            Confidence of the interval, between 0 and 1.
    """
    estimate = torch.stack([log_z(row) for row in log_weights]).double()  # (P,)
    error = torch.stack([log_z_standard_error(row) for row in log_weights]).double()
    half_width = float(norm.ppf((1 + confidence) / 2)) * error
    none = estimate == -torch.inf
    low = torch.where(none, -torch.inf, estimate - half_width)
    return LogZ(estimate, low, torch.where(none, torch.inf, estimate + half_width), confidence)


def checked_request(
    posterior: "Posterior",
    proposal: Proposal | None,
    prompts: Sequence[Prompt],
    n: int,
    generator: torch.Generator | None,
    columns: Mapping[str, Sequence] | None,
) -> Proposal:
    """
    Check the arguments of a sampler before anything is drawn; returns the proposal, by default the prior.

    Args:
        posterior, prompts, n, generator, columns:
            As in [`Sampler.sample`].
        proposal ([`Proposal`], *optional*):
            The distribution to draw from. Default: the prior.

    Raises:
        `ValueError`: if there are no prompts, n is below 1, columns have another length, or the proposal misses part
            of the posterior.
        `TypeError`: if the posterior, proposal, a prompt or the generator is not one.
    """
    if not hasattr(posterior, "prior"):
        raise TypeError(
            f"`posterior` must be a Posterior, got {type(posterior).__name__}. Make one of a LanguageModel: "
            "`prior.tilt(reward_func, beta)`."
        )
    check_proposal("proposal", posterior.prior if proposal is None else proposal)
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(
            f"`generator` must be a torch.Generator, got {generator!r}. Of a seed: `torch.Generator().manual_seed(0)`."
        )
    check_prompts(prompts)
    check_count("n", n)
    check_columns(columns, prompts)
    if proposal is None or proposal is posterior.prior:
        return posterior.prior
    _check_support(posterior, proposal, prompts, generator, columns)
    return proposal


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise ValueError or TypeError unless these are a list of prompts."""
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"`prompts` must be a non-empty list of texts or of chats, got {prompts!r}. Pass a list.")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str | list):
            raise TypeError(f"`prompts` must hold texts or chats, row {row} is {prompt!r}. Pass text, or messages.")


def check_columns(columns: Mapping[str, Sequence] | None, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError unless columns of the dataset have one entry for each prompt."""
    for name, values in (columns or {}).items():
        if len(values) != len(prompts):
            raise ValueError(
                f"`columns['{name}']` must have one entry a prompt, {len(prompts)}, got {len(values)}. Take both from "
                "the same rows of the dataset: entries are repeated for the completions of a prompt."
            )


def check_proposal(name: str, proposal: Any) -> None:
    """Raise TypeError unless this can be drawn from and has a density."""
    if not isinstance(proposal, Proposal):
        raise TypeError(
            f"`{name}` must have the methods `sample` and `log_prob`, got {type(proposal).__name__}. Wrap a model or "
            "its path: `LanguageModel(model, prior.tokenizer, prior.max_completion_length)`."
        )


def check_count(name: str, value: Any, at_least: int = 1) -> None:
    """Raise ValueError unless this is an integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"`{name}` must be an integer of at least {at_least}, got {value!r}.")


def check_confidence(confidence: float) -> None:
    """Raise ValueError unless this is between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")


def _check_support(
    posterior: "Posterior",
    proposal: Proposal,
    prompts: Sequence[Prompt],
    generator: torch.Generator | None,
    columns: Mapping[str, Sequence] | None,
) -> None:
    prior = posterior.prior
    if isinstance(proposal, LanguageModel):
        check_same_support("proposal", proposal, prior)
        return  # a softmax is positive everywhere
    # draws from q cannot show what q never draws, so q is evaluated on draws of the prior
    per_prompt = -(-_SUPPORT_DRAWS // len(prompts))
    few = min(len(prompts), _SUPPORT_DRAWS)
    few_columns = {name: values[:few] for name, values in (columns or {}).items()}
    probe = draw_scored(posterior, prior, prompts[:few], [per_prompt] * few, generator, few_columns)
    log_q = proposal.log_prob(probe.drawn.prompts, probe.drawn.completion_ids).double().cpu()
    missed = (log_q == -torch.inf) & (probe.log_likelihood > -torch.inf)
    if bool(missed.any()):
        row = probe.row(int(missed.int().argmax()))
        raise ValueError(
            f"`proposal` must be able to draw whatever the posterior allows, but gives probability 0 to "
            f"{row.text!r} of prompt {row.prompt!r}, a draw from the prior: weights would miss that part of the "
            "posterior. Remove top-k, top-p or whatever else truncates it."
        )


_SUPPORT_DRAWS = 64


def check_supported(none_allowed: Tensor, drawn: str, prompts: Sequence[Prompt], stacklevel: int = 3) -> None:
    """
    Warn of prompts without any draw that the posterior allows.

    Args:
        none_allowed (`torch.Tensor`): (P,) bool: whether a prompt has no such draw.
        drawn (`str`): a name for the draws, for the message.
        prompts (`Sequence`): P prompts.
        stacklevel (`int`): stack level of the warning.

    Raises:
        `ValueError`: if no prompt has such a draw.
    """
    count = int(none_allowed.sum())
    if count == 0:
        return
    first = prompts[int(none_allowed.int().argmax())]
    message = (
        f"None of {drawn} is allowed by the posterior, for {count} of {len(prompts)} prompts, the first {first!r}. "
        "Draw more, or pass a `proposal` trained towards this posterior."
    )
    if count == len(prompts):
        raise ValueError(message)
    warnings.warn(message + " These prompts have no weighted draws.", stacklevel=stacklevel)


def rows_of(draws: Draws) -> list[Row]:
    """The rows of draws, one by one."""
    columns = (draws.prompt_index.tolist(), draws.prompts, draws.completion_ids, draws.texts, draws.completions)
    return [Row(*row) for row in zip(*columns, strict=True)]


def as_draws(
    rows: Sequence[Row],
    num_prompts: int,
    guarantee: Guarantee,
    dependence: Dependence,
    log_weights: Tensor | None = None,
    log_z: LogZ | None = None,
    info: Mapping[str, Any] | None = None,
) -> Draws:
    """
    [`Draws`] from rows in the order of the prompts.

    Args:
        rows (`Sequence[Row]`):
            B completions.
        num_prompts (`int`):
            P.
        guarantee, dependence, log_weights, log_z, info:
            Fields of [`Draws`].
    """
    return Draws(
        prompts=[row.prompt for row in rows],
        prompt_index=torch.tensor([row.prompt_index for row in rows], dtype=torch.long),
        completion_ids=[row.completion_ids for row in rows],
        texts=[row.text for row in rows],
        completions=[row.completion for row in rows],
        log_weights=log_weights,
        guarantee=guarantee,
        num_prompts=num_prompts,
        dependence=dependence,
        log_z=log_z,
        info=dict(info or {}),
    )
