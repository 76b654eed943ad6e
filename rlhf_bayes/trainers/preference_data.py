"""Preference data: what a row says of its pair, checked, and as tensors."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from datasets import Dataset

from ..numerics import votes_to_prob

logger = logging.getLogger(__name__)

JUDGEMENT_COLUMNS = ("chosen_prob", "votes", "annotator", "annotators", "annotator_votes")
PAIR_COLUMNS = ("pair_prob", "pair_votes", "pair_annotators", "pair_labels", "pair_weights")
_LABELS = {"chosen": 1.0, "rejected": 0.0, "tie": 0.5}
_VOTES = ("chosen", "rejected", "tie")


class Judgement(NamedTuple):
    """What people said of a pair."""

    chosen_prob: float
    """Share of the votes for chosen, half of the ties included."""
    votes: list[int] | None
    """Votes for chosen, for rejected, and ties."""
    annotators: list[str] | None
    """Who voted."""
    labels: list[float] | None
    """What each of them said: 1 chosen, 0 rejected, ½ tie."""


def read_judgement(row: Mapping[str, Any], where: str) -> Judgement:
    """
    The judgement in a row: `chosen_prob`, or `votes`, or `annotators` with `annotator_votes`; `annotator` names who
    made a judgement of one of the first two kinds. Without any, chosen was chosen.

    Args:
        row (`Mapping[str, Any]`): a row of the dataset.
        where (`str`): the row's name in errors.

    Raises:
        `ValueError`: a probability outside of [0, 1], negative or no votes, or columns that contradict each other.
    """
    if "chosen_prob" in row and ("votes" in row or "annotator_votes" in row):
        raise ValueError(
            f"{where} must say once how the pair was judged, got `chosen_prob` and votes. Remove one of the columns."
        )
    if "annotator_votes" in row:
        return _by_annotators(row, where)
    votes, prob = None, 1.0
    if "votes" in row:
        votes = _checked_votes(row["votes"], where)
        prob = float(votes_to_prob(torch.tensor(votes, dtype=torch.float)))
    elif "chosen_prob" in row:
        prob = row["chosen_prob"]
        if isinstance(prob, bool) or not isinstance(prob, (int, float)) or not 0 <= prob <= 1:
            raise ValueError(
                f"`chosen_prob` must be a number in [0, 1], got {prob!r} in {where}: it is the share of people who "
                "prefer the chosen text. Divide votes by their number."
            )
    annotator = row.get("annotator")
    if "annotator" in row and annotator is None:
        raise ValueError(f"`annotator` must be an id, got None in {where}. Name who judged the pair, or drop the row.")
    by_one = annotator is not None
    return Judgement(float(prob), votes, [str(annotator)] if by_one else None, [float(prob)] if by_one else None)


def _by_annotators(row: Mapping[str, Any], where: str) -> Judgement:
    names, said = row.get("annotators"), row["annotator_votes"]
    if not isinstance(names, Sequence) or isinstance(names, str) or len(names) != len(said) or not said:
        raise ValueError(
            f"`annotators` must list the one who cast each of `annotator_votes`, got {names!r} and {said!r} in "
            f"{where}. Give both columns, of equal length and not empty."
        )
    unknown = [vote for vote in said if vote not in _LABELS]
    if unknown:
        raise ValueError(
            f"`annotator_votes` must hold 'chosen', 'rejected' or 'tie', got {unknown[0]!r} in {where}. Map the "
            "labels of your data to these."
        )
    votes = [said.count(name) for name in _VOTES]
    if "votes" in row and _checked_votes(row["votes"], where) != votes:
        raise ValueError(
            f"`votes` must be the counts of `annotator_votes`, got {row['votes']!r} for {said!r} in {where}. Remove "
            "one of the columns."
        )
    labels = [_LABELS[vote] for vote in said]
    return Judgement(sum(labels) / len(labels), votes, [str(name) for name in names], labels)


def _checked_votes(votes: Any, where: str) -> list[int]:
    counts = [votes.get(name, 0) for name in _VOTES] if isinstance(votes, Mapping) else list(votes)
    if len(counts) == 2:
        counts = [*counts, 0]
    whole = all(isinstance(count, int) and count >= 0 for count in counts)
    if len(counts) != 3 or not whole or not sum(counts):
        raise ValueError(
            f"`votes` must count the votes for chosen, for rejected and the ties, at least one in all, got {votes!r} "
            f"in {where}. Drop pairs that nobody judged."
        )
    return counts


@final
@dataclass(frozen=True)
class PairReader:
    """Adds `PAIR_COLUMNS` to a row: its judgement as numbers, and how often the pair counts for each member."""

    name: str
    """The dataset's name in errors."""
    annotators: dict[str, int] | None
    """Index of each annotator, where their votes are told apart."""
    num_members: int
    """Members that resample the pairs; 1 for none."""
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
            # a function of the row: no process, epoch or resume draws another sample
            weights = np.random.default_rng((self.seed, index)).poisson(1.0, self.num_members)
            columns["pair_weights"] = weights.tolist()
        return columns


def check_pairs(name: str, dataset: Any) -> None:
    """
    Refuse preference data that nothing can be learnt from; count and report what is odd.

    Raises:
        `ValueError`: a missing column, no rows, or nothing but ties.
        `TypeError`: a text that is neither a string nor a list of messages.
    """
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_pairs(f"{name}['{key}']", part)
        return
    columns = getattr(dataset, "column_names", None)
    if columns is None:  # a stream that does not know them
        return
    tokenised = {"chosen_ids", "rejected_ids"} <= set(columns)
    if not tokenised and not {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            f"`{name}` must have the columns `chosen` and `rejected`, got {list(columns)}. Rename those that hold the "
            f"preferred and the other text: `dataset.rename_column({(columns or ['better'])[0]!r}, 'chosen')`."
        )
    if not isinstance(dataset, Dataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"`{name}` must hold at least one pair, got none. Check the split and the filters before it.")
    if not tokenised:
        _check_texts(name, dataset)
    if set(columns) & set(JUDGEMENT_COLUMNS):
        judged = dataset.select_columns([column for column in columns if column in JUDGEMENT_COLUMNS])
        probs = [read_judgement(row, f"`{name}` row {index}").chosen_prob for index, row in enumerate(judged)]
        if all(prob == 0.5 for prob in probs):
            raise ValueError(
                f"`{name}` must hold at least one pair that is not a tie, got {len(dataset)} ties: no reward follows "
                "from them. Check how votes were mapped."
            )


def _check_texts(name: str, dataset: Dataset) -> None:
    identical = empty = 0
    pairs = dataset.select_columns(["chosen", "rejected"])
    for index, row in enumerate(pairs):
        for column, text in row.items():
            if not isinstance(text, (str, list)):
                raise TypeError(
                    f"`{column}` must hold texts or lists of chat messages, got {text!r} in `{name}` row {index}. "
                    "Drop or convert such rows."
                )
        identical += row["chosen"] == row["rejected"]
        empty += not row["chosen"] or not row["rejected"]
    if identical == len(dataset):
        raise ValueError(
            f"`{name}` must hold at least one pair of different texts, got {identical} pairs of identical ones. Check "
            "which columns were taken for `chosen` and `rejected`."
        )
    if identical:
        logger.warning(
            f"{identical} of {len(dataset)} pairs in `{name}` have identical texts. They are kept, teach nothing, and "
            "lower the accuracy: drop them with `dataset.filter(lambda row: row['chosen'] != row['rejected'])`."
        )
    if empty:
        logger.warning(
            f"{empty} of {len(dataset)} pairs in `{name}` have an empty text. They are kept: the reward of an empty "
            "answer is learnt. Drop them if the text was lost on the way."
        )


def fit_length(dataset: Any, name: str, max_length: int | None, overlong: str) -> Any:
    """
    Drop, truncate or refuse tokenised pairs of which a text has more than `max_length` tokens, and report how many.

    Raises:
        `ValueError`: `overlong="error"` and there is one, or none would be left.
    """
    if max_length is None:
        return dataset
    if not isinstance(dataset, Dataset):  # a stream: dealt with as the pairs come, so not counted
        if overlong == "truncate":
            return dataset.map(functools.partial(_truncated, max_length=max_length))
        return dataset.filter(functools.partial(_fits, max_length=max_length))
    ids = dataset.select_columns(["chosen_ids", "rejected_ids"])
    fitting = [index for index, row in enumerate(ids) if _fits(row, max_length)]
    too_long = len(dataset) - len(fitting)
    if not too_long:
        return dataset
    found = (
        f"{too_long} of {len(dataset)} pairs in `{name}` have a text of more than `max_length` = {max_length} tokens"
    )
    if overlong == "error":
        raise ValueError(f"{found}. Raise `max_length`, or set `overlong` to 'drop' or 'truncate'.")
    if overlong == "truncate":
        logger.warning(f"{found}: the last {max_length} tokens are kept.")
        return dataset.map(functools.partial(_truncated, max_length=max_length))
    if not fitting:
        raise ValueError(f"{found}: none is left. Raise `max_length`, or set `overlong='truncate'`.")
    logger.warning(f"{found}: they are dropped. Raise `max_length`, or set `overlong='truncate'` to keep them.")
    return dataset.select(fitting)


def _fits(row: Mapping[str, Any], max_length: int) -> bool:
    return len(row["chosen_ids"]) <= max_length and len(row["rejected_ids"]) <= max_length


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
    """Any collator of pairs, and the tensors of `PAIR_COLUMNS` beside its own."""

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
