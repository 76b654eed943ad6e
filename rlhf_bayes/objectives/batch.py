"""Typed batches of completions that an objective learns from, and operations on their rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_bayes.lm.model_inputs import RowInputs


@dataclass(frozen=True)
class Batch:
    """
    B completions; subclasses add the fields that an objective learns from.

    A field is a tensor with a row for each completion, (B, …), or with one value for all of them, (). Fields of
    tokens, (B, T), are padded on the right. A list has an entry for each completion.
    """

    prompt_ids: Tensor
    """(B, P): token ids of the prompts, padded on the left."""
    prompt_mask: Tensor
    """(B, P): 1 for the tokens of the prompt."""
    completion_ids: Tensor
    """(B, T): token ids of the completions, padded on the right."""
    completion_mask: Tensor
    """(B, T): 1 for the tokens of the completion, the first EOS included."""
    model_inputs: list[RowInputs] | None = field(default=None, kw_only=True)
    """B mappings: what a vision-language model reads of each prompt besides its tokens; None for other models."""
    policy_mask: Tensor | None = field(default=None, kw_only=True)
    """(B, T): as in [`Rollout`]: 0 for the tokens of an environment; None if there are none."""

    def __len__(self) -> int:
        return len(self.completion_mask)

    @property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sequences in the form that [`~rlhf_bayes.lm.score_completions`] takes."""
        return self.prompt_ids, self.prompt_mask, self.completion_ids, self.completion_mask

    @property
    def policy_tokens(self) -> Tensor:
        """(B, T) bool: the tokens of the completion that the policy drew."""
        return policy_tokens(self.completion_mask, self.policy_mask)

    @property
    def lengths(self) -> Tensor:
        """(B,): number of tokens of prompt and completion."""
        return self.prompt_mask.sum(-1) + self.completion_mask.sum(-1)

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> Self:
        """A batch from a mapping, which may have other entries too. An optional field that is missing becomes None."""
        return cls(**{field.name: columns[field.name] for field in fields(cls) if field.name in columns})

    def columns(self) -> dict[str, Any]:
        """Name -> tensor or list, for hosts that shuffle and split dictionaries."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def take(self, rows: Tensor | slice) -> Self:
        """The given rows, (M,) indices or a slice, in this order."""
        return type(self)(**{name: _taken(column, rows) for name, column in self.columns().items()})

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """Batches with the given numbers of rows, in order."""
        stops = torch.tensor(sizes).cumsum(0).tolist()
        return [self.take(slice(stop - size, stop)) for size, stop in zip(sizes, stops, strict=True)]


B = TypeVar("B", bound=Batch)


def policy_tokens(completion_mask: Tensor, policy_mask: Tensor | None) -> Tensor:
    """The tokens of completions without those of an environment: (B, T) bool, from masks (B, T)."""
    return completion_mask.bool() if policy_mask is None else completion_mask.bool() & policy_mask.bool()


def joined(batches: Sequence[B]) -> B:
    """
    One batch with all rows of several, padded to the longest. Values without rows are taken from the first.

    Raises:
        ValueError: if one has a field that another has not, since its rows could not be kept whole.
    """
    columns = [batch.columns() for batch in batches]
    if any(part.keys() != columns[0].keys() for part in columns):
        raise ValueError(f"Batches must have the same fields to be joined, got {[sorted(part) for part in columns]}.")
    return type(batches[0])(**{name: _joined([part[name] for part in columns], name) for name in columns[0]})


def by_length(batches: list[B]) -> list[B]:
    """The same rows in batches of the same sizes, sorted by length, so that the model reads little padding."""
    if len(batches) == 1:
        return batches
    whole = joined(batches)
    return whole.take(whole.lengths.argsort(stable=True)).split([len(batch) for batch in batches])


def _taken(column: Any, rows: Tensor | slice) -> Any:
    if isinstance(column, list):
        return [column[row] for row in torch.arange(len(column))[rows].tolist()]
    return column if column.dim() == 0 else column[rows]


def _joined(parts: list[Any], name: str) -> Any:
    if isinstance(parts[0], list):
        return [row for part in parts for row in part]
    if parts[0].dim() == 0:
        return parts[0]
    if parts[0].dim() == 1:
        return torch.cat(parts)
    width = max(part.size(1) for part in parts)
    on_left = name in ("prompt_ids", "prompt_mask")
    missing = [width - part.size(1) for part in parts]
    return torch.cat([pad(part, (n, 0) if on_left else (0, n)) for part, n in zip(parts, missing, strict=True)])
