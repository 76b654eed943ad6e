"""The protocols of samplers and proposals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf_bayes.lm import Completions, Prompt
from rlhf_bayes.samplers.draws import Draws, Guarantee

if TYPE_CHECKING:
    from rlhf_bayes.posterior import Posterior


@runtime_checkable
class Proposal(Protocol):
    """
    A distribution over completions that can be drawn from and whose density is known.

    It is the prior or a trained policy, both a [`~rlhf_bayes.LanguageModel`], or a guided decoder. It must be positive
    wherever the posterior is.
    """

    def sample(self, prompts: Sequence[Prompt], n: int = 1, generator: torch.Generator | None = None) -> Completions:
        """n completions for each of P prompts, P · n rows; `log_prob` of the result is their log q, in nats."""
        ...

    def log_prob(self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """log q of each completion: (B,), nats."""
        ...


class Sampler(Protocol):
    """An object that draws from a posterior without training."""

    def sample(
        self,
        posterior: "Posterior",
        prompts: Sequence[Prompt],
        n: int,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Draws:
        """
        Draw completions of each prompt.

        Args:
            posterior ([`~rlhf_bayes.Posterior`]):
                The posterior to draw from.
            prompts (`Sequence` of `str` or of chats):
                P prompts.
            n (`int`):
                Completions for each prompt.
            generator (`torch.Generator`, *optional*):
                Makes the draws reproducible.
            columns (`Mapping[str, Sequence]`, *optional*):
                Columns of the dataset that reward functions ask for, P entries each.
        """
        ...


@dataclass(frozen=True)
class SamplerRecord:
    """A sampler as `rlhf-bayes sample`, the benchmarks, the tests and the table of docs/sampling.md know it."""

    sampler: type
    """Its class."""
    guarantee: str
    """What its draws are worth, in the words of [`Guarantee`], for tables."""
    guarantees: tuple[Guarantee, ...]
    """Those that its draws may have."""
    help: str
    """What it is good for, in one line, for `--help` and tables."""
    make: Callable[["Posterior", Any, int], Sampler]
    """From the flags: the posterior, a [`Proposal`] or None for the prior, and the number of completions a prompt."""
