"""The protocols of samplers and proposals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf_bayes.lm import Completions, Prompt
from rlhf_bayes.samplers.draws import Draws

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
