"""Prepares preference data for a reward trainer: columns, lengths, tensors."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from datasets import Dataset

from rlhf_bayes.rewards import JUDGEMENT_COLUMNS, read_judgement
from rlhf_bayes.rewards.lengths import LengthLimit, identical_rows, overlong_rows

logger = logging.getLogger(__name__)

PAIR_COLUMNS = ("pair_prob", "pair_votes", "pair_annotators", "pair_labels", "pair_weights")


@final
@dataclass(frozen=True)
class PairReader:
    """Adds `PAIR_COLUMNS` to a row: its judgement as numbers, and how often the pair counts for each member."""

    name: str
    """The dataset's name in errors."""
    annotators: dict[str, int] | None
    """Index of each annotator, where the trainer needs to know who voted."""
    num_members: int
    """Number of members that resample the pairs; 1 for no resampling."""
    seed: int

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        judgement = read_judgement(row, f"`{self.name}` row {index}")
        columns: dict[str, Any] = {"pair_prob": judgement.chosen_prob}
        if judgement.votes is not None:
            columns["pair_votes"] = judgement.votes
        if self.annotators is not None and judgement.annotators is not None:
            columns["pair_annotators"] = [self.annotators[name] for name in judgement.annotators]
            columns["pair_labels"] = judgement.labels
        if self.num_members > 1:
            # seeded by the row's index, so that every process, epoch and resumed run draws the same sample
            weights = np.random.default_rng((self.seed, index)).poisson(1.0, self.num_members)
            columns["pair_weights"] = weights.tolist()
        return columns


def fit_length(dataset: Any, name: str, limit: LengthLimit, overlong: str) -> Any:
    """
    Drop, truncate or refuse tokenised pairs with a text that is too long, and report their number and rows.

    Args:
        dataset (`Dataset` or a stream): Pairs, with `chosen_ids` and `rejected_ids`.
        name (`str`): Name of the dataset in messages.
        limit ([`~rlhf_bayes.rewards.lengths.LengthLimit`]): The longest text, in tokens.
        overlong (`str`): `"drop"`, `"truncate"` or `"error"`.

    Raises:
        `ValueError`: if `overlong` is `"error"` and a text is too long, if no pair would be left, or if all truncated
            pairs are identical.
    """
    if limit.tokens is None:
        return dataset
    if not isinstance(dataset, Dataset):  # the pairs of a stream are handled when they are read, so not counted
        if overlong == "truncate":
            return dataset.map(functools.partial(_truncated, max_length=limit.tokens))
        if overlong == "error":
            return dataset.filter(functools.partial(_must_fit, name=name, limit=limit), with_indices=True)
        logger.warning(
            f"`{name}` is a stream: pairs with a text of more than {limit} are dropped without being counted. Set "
            "`overlong` to 'truncate' to keep them, or to 'error' to find them."
        )
        return dataset.filter(functools.partial(_fits, limit=limit))
    ids: Any = dataset.select_columns(["chosen_ids", "rejected_ids"])
    too_long, identical, alike = [], [], 0
    for index, row in enumerate(ids):
        alike += row["chosen_ids"] == row["rejected_ids"]
        if not _fits(row, limit):
            too_long.append(index)
            cut = _truncated(row, limit.tokens)
            if cut["chosen_ids"] == cut["rejected_ids"] and row["chosen_ids"] != row["rejected_ids"]:
                identical.append(index)
    overlong_rows(f"pairs in `{name}`", too_long, len(dataset), limit, overlong)
    if not too_long:
        return dataset
    if overlong == "truncate":
        identical_rows(f"pairs in `{name}`", identical, len(dataset) - alike, limit)
        return dataset.map(functools.partial(_truncated, max_length=limit.tokens))
    dropped = set(too_long)
    return dataset.select([index for index in range(len(dataset)) if index not in dropped])


def _fits(row: Mapping[str, Any], limit: LengthLimit) -> bool:
    return limit.allows(len(row["chosen_ids"])) and limit.allows(len(row["rejected_ids"]))


def _must_fit(row: Mapping[str, Any], index: int, name: str, limit: LengthLimit) -> bool:
    if _fits(row, limit):
        return True
    longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    raise ValueError(
        f"A pair in `{name}`, row {index}, has a text of {longest} tokens, more than {limit}. {limit.advice}, or set "
        "`overlong` to 'drop' or 'truncate'."
    )


def _truncated(row: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    return {name: row[name][-max_length:] for name in ("chosen_ids", "rejected_ids")}


def annotators_in(dataset: Dataset) -> tuple[list[str], int]:
    """Ids of the annotators of a dataset, sorted, and the number of their votes."""
    columns = [name for name in dataset.column_names if name in JUDGEMENT_COLUMNS]
    names: set[str] = set()
    num_votes = 0
    for index, row in enumerate(dataset.select_columns(columns)):
        voters = read_judgement(row, f"`train_dataset` row {index}").annotators or []
        names.update(voters)
        num_votes += len(voters)
    return sorted(names), num_votes


@final
class PairCollator:
    """A collator of pairs that adds the tensors of `PAIR_COLUMNS` to those of another one."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [dict(row) for row in rows]
        columns = {name: [row.pop(name) for row in rows] for name in PAIR_COLUMNS if name in rows[0]}
        batch = self.collate(rows)
        for name in ("pair_prob", "pair_votes", "pair_weights"):
            if name in columns:
                batch[name] = torch.tensor(columns[name], dtype=torch.float)
        if "pair_annotators" in columns:
            batch["pair_annotators"] = _padded(columns["pair_annotators"], -1)  # (B, A)
            batch["pair_labels"] = _padded(columns["pair_labels"], 0.5)  # (B, A)
        return batch


def _padded(rows: list[list], value: float) -> torch.Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
