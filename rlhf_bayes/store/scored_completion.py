"""A completion with all that is known of it, as it is kept in a store."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from rlhf_bayes.lm import Prompt

REWARD, FEATURE, DENSITY = "reward/", "feature/", "log_density/"
"""Prefixes of the columns of a store: a reward function, a feature, the density of a proposal at all rows."""


@final
@dataclass(frozen=True)
class ScoredCompletion:
    """A completion as it was drawn, before β, weights, clipping or conditions."""

    prompt: Prompt
    """A text, or the messages of a chat."""
    prompt_ids: Sequence[int]
    """The token ids of the prompt."""
    completion: str
    """The decoded completion, without special tokens."""
    completion_ids: Sequence[int]
    """Token ids, up to and including the first EOS."""
    ended: bool
    """Whether EOS was drawn; false for a completion cut at `max_completion_length`."""
    log_prior: float
    """log π0(x | c), nats."""
    log_proposal: float
    """log q(x | c) of what drew it, nats."""
    drawn_by: str
    """The name of what drew it: "prior", or for instance "policy at step 12". Equal names mean equal weights."""
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    """Name -> what the reward function returned: None where it does not apply, -inf where it forbids."""
    features: Mapping[str, float | None] = field(default_factory=dict)
    """Name -> feature, for conditions and moments."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the dataset's row, which JSON must be able to hold."""
    log_densities: Mapping[str, float] = field(default_factory=dict)
    """Name of another proposal -> its log-density at this completion, nats, where it was computed."""
    step: int | None = None
    """The optimizer step of the training that drew it."""

    def as_row(self) -> dict[str, Any]:
        """
        The row of the file.

        Raises:
            ValueError: if a log-probability is not finite, or a number is nan or +inf.
        """
        where = f"completion {self.completion!r} of prompt {self.prompt!r}"
        numbers = {"log_prior": self.log_prior, "log_proposal": self.log_proposal}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"`{name}` must be finite to be stored, got {value} for {where}: the model that scored it is "
                    "broken, or another one than that which drew. Score it in float32."
                )
        scores = {f"{REWARD}{name}": value for name, value in self.rewards.items()}
        scores |= {f"{FEATURE}{name}": value for name, value in self.features.items()}
        scores |= {f"{DENSITY}{name}": value for name, value in self.log_densities.items()}
        for name, value in scores.items():
            if value is not None and (math.isnan(value) or value == math.inf):
                raise ValueError(f"`{name}` must be a number, -inf or None to be stored, got {value} for {where}.")
        return {
            "prompt": self.prompt if isinstance(self.prompt, str) else _json(self.prompt),
            "is_chat": not isinstance(self.prompt, str),
            "columns": _json(dict(self.columns)),
            "prompt_ids": list(self.prompt_ids),
            "completion": self.completion,
            "completion_ids": list(self.completion_ids),
            "ended": bool(self.ended),
            **{name: float(value) for name, value in numbers.items()},
            "drawn_by": self.drawn_by,
            "step": self.step,
            **{name: None if value is None else float(value) for name, value in scores.items()},
        }


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(
            f"Prompts and columns must be texts, numbers, lists or mappings to be stored, got {value!r}: {error}. "
            "Leave out images and arrays: a store holds text only."
        ) from error
