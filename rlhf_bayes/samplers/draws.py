"""The result of a sampler: completions, their weights, and its guarantee."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlhf_bayes.lm import Completion, Completions, Prompt
from rlhf_bayes.notebook import Described, html_table, in_short, shortened
from rlhf_bayes.samplers.dependence import ChainRows, Dependence
from rlhf_bayes.samplers.exports import as_arviz, as_dataset, as_pandas

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

_SHOWN = 5
"""Rows that a notebook shows."""

Guarantee = Literal["exact", "consistent", "unconverged", "bounded", "none"]
"""
`"exact"`: independent draws from the posterior. `"consistent"`: estimates converge to those of the posterior as draws,
particles or steps grow. `"unconverged"`: they would, but these chains still disagree. `"bounded"`: the distance of the
draws' distribution from the posterior is known. `"none"`: another distribution.
"""


@dataclass(frozen=True)
class LogZ:
    """A sampler's estimate of log Z of each prompt: (P,), fp64, nats."""

    log_z: Tensor
    """The estimate; `-inf` where no draw is allowed by the posterior."""
    low: Tensor
    """Lower end of the confidence interval."""
    high: Tensor
    """Upper end of the interval."""
    confidence: float = 0.95
    """Confidence of the interval."""


@dataclass(frozen=True, repr=False)
class Draws(Described):
    """
    Completions from a sampler, B rows in the order of the prompts.

    A prompt has fewer than were asked for where the sampler's budget ended: see `counts`.
    """

    prompts: list[Prompt]
    """The prompt of each row."""
    prompt_index: Tensor
    """(B,) integers: index of each row's prompt."""
    completion_ids: list[list[int]]
    """Token ids up to and including the first EOS."""
    texts: list[str]
    """The decoded completions, without special tokens."""
    completions: list[Completion]
    """The completions as reward functions take them: a text, or one assistant message for a chat prompt."""
    log_weights: Tensor | None
    """(B,) fp64, nats: log of posterior density over proposal density, up to a constant for each prompt; `-inf` is
    weight 0. None where all rows of a prompt have equal weight."""
    guarantee: Guarantee
    """The guarantee for the weighted rows."""
    num_prompts: int
    """The number of prompts, P."""
    dependence: Dependence
    """How the rows of a prompt depend on each other, which determines the standard error of a mean."""
    log_z: LogZ | None = None
    """log Z of each prompt; None where the sampler does not estimate it."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Diagnostics: acceptance rates, effective sample sizes, k̂, tokens evaluated, … They are plain numbers and lists
    to be read; no estimate is computed from them."""

    @property
    def counts(self) -> Tensor:
        """(P,): number of rows of each prompt."""
        return torch.bincount(self.prompt_index, minlength=self.num_prompts)

    @property
    def weights(self) -> Tensor:
        """(B,) fp64: weights that sum to 1 over the rows of each prompt; 0 where all of a prompt's are 0."""
        log_weights = torch.zeros(len(self.prompts)) if self.log_weights is None else self.log_weights
        weights = torch.zeros(len(self.prompts), dtype=torch.float64)
        for prompt in range(self.num_prompts):
            rows = self.prompt_index == prompt
            if bool((log_weights[rows] > -torch.inf).any()):
                weights[rows] = log_weights[rows].double().softmax(0)
        return weights

    @property
    def chain(self) -> Tensor:
        """(B,) integers: the Markov chain of each row, counted from 0 for each prompt; 0 where rows are no states."""
        return self._place % self._num_chains

    @property
    def step(self) -> Tensor:
        """(B,) integers: place of the row within its chain; without chains, within the rows of its prompt."""
        return self._place // self._num_chains

    def to_pandas(self) -> "DataFrame":
        """A `pandas.DataFrame` with a row for each completion: see [`~rlhf_bayes.samplers.exports.columns_of`]."""
        return as_pandas(self)

    def to_dataset(self) -> "Dataset":
        """A `datasets.Dataset` with the columns of `to_pandas`."""
        return as_dataset(self)

    def to_arviz(self, values: Mapping[str, Sequence[float] | Tensor] | None = None) -> Any:
        """
        ArviZ's `InferenceData`, with the dimensions chain, draw and prompt: see [`as_arviz`].

        Args:
            values (`Mapping[str, Sequence[float]]`, *optional*):
                name -> (B,): further numbers of the rows, for instance their rewards.

        Raises:
            ImportError: if ArviZ is not installed.
            ValueError: if prompts or chains have different numbers of rows, or values another number.
        """
        return as_arviz(self, values)

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def _num_chains(self) -> int:
        return self.dependence.num_chains if isinstance(self.dependence, ChainRows) else 1

    @property
    def _place(self) -> Tensor:
        """(B,): place of each row among those of its prompt."""
        place = torch.zeros_like(self.prompt_index)
        for prompt in range(self.num_prompts):
            rows = self.prompt_index == prompt
            place[rows] = torch.arange(int(rows.sum()))
        return place

    def _facts(self) -> dict[str, Any]:
        return {
            "rows": len(self),
            "prompts": self.num_prompts,
            "guarantee": self.guarantee,
            "sampler": self.info.get("sampler"),
            "weighted": self.log_weights is not None,
            "log_z": None if self.log_z is None else self.log_z.log_z.tolist()[:_SHOWN],
            "checks": checks_in_words(self.info) or None,
        }

    def _repr_html_(self) -> str:
        rows = [
            (shortened(str(self.prompts[row])), shortened(self.texts[row]), in_short(weight))
            for row, weight in enumerate(self.weights[:_SHOWN].tolist())
        ]
        more = f"{len(self) - _SHOWN:,} more rows: `draws.to_pandas()`" if len(self) > _SHOWN else ""
        return super()._repr_html_() + html_table(("prompt", "completion", "weight"), rows, note=more)

    @classmethod
    def of(
        cls,
        drawn: Completions,
        num_prompts: int,
        kept: Sequence[int] | None = None,
        *,
        guarantee: Guarantee,
        dependence: Dependence,
        log_weights: Tensor | None = None,
        log_z: LogZ | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> "Draws":
        """
        [`Draws`] from completions with the same number of rows for each prompt.

        Args:
            drawn (`Completions`):
                P · n rows, grouped by prompt.
            num_prompts (`int`):
                P.
            kept (`Sequence[int]`, *optional*):
                The rows to keep, repeated where resampled, in the order of the prompts. Default: all.
            guarantee, dependence, log_z, info:
                Fields of [`Draws`].
            log_weights (`Tensor`, *optional*):
                Log-weights of the rows that are kept.
        """
        rows = list(range(len(drawn))) if kept is None else list(kept)
        n = len(drawn) // num_prompts
        return cls(
            prompts=[drawn.prompts[row] for row in rows],
            prompt_index=torch.tensor([row // n for row in rows], dtype=torch.long),
            completion_ids=[drawn.completion_ids[row] for row in rows],
            texts=[drawn.texts[row] for row in rows],
            completions=[drawn.completions[row] for row in rows],
            log_weights=None if log_weights is None else log_weights.double().cpu(),
            guarantee=guarantee,
            num_prompts=num_prompts,
            dependence=dependence,
            log_z=log_z,
            info=dict(info or {}),
        )


_CHECKS = {
    "importance_ess": ("ESS ≥ {:.0f}", min),
    "khat": ("k̂ ≤ {:.2f}", max),
    "acceptance": ("acceptance ≥ {:.3f}", min),
    "tv": ("TV ≤ {:.2f}", max),
    "rhat": ("R-hat ≤ {:.2f}", max),
    "effective_sample_size": ("ESS ≥ {:.0f}", min),
    "ancestors": ("ancestors ≥ {:.0f}", min),
}


def checks_in_words(info: Mapping[str, Any]) -> str:
    """A sampler's own checks of its draws, for the worst prompt; from `info` of [`Draws`]."""
    found = []
    for name, (text, worst) in _CHECKS.items():
        values = [value for value in info.get(name) or [] if value is not None]
        if values and not (name == "tv" and max(values) == 0):
            found.append(text.format(worst(values)))
    return ", ".join(found)
