"""Reads and checks the judgements of people in preference data, row by row."""

import ast
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from rlhf_bayes.numerics.bradley_terry import votes_to_prob

logger = logging.getLogger(__name__)

JUDGEMENT_COLUMNS = ("chosen_prob", "votes", "annotator", "annotators", "annotator_votes")
_LABELS = {"chosen": 1.0, "rejected": 0.0, "tie": 0.5}
_VOTES = ("chosen", "rejected", "tie")
# the second pair of names is deprecated in TRL, but TRL still accepts it
_TOKENISED = (("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids"))
_LISTS = ("votes", "annotators", "annotator_votes")


class Judgement(NamedTuple):
    """The judgement of people on a pair."""

    chosen_prob: float
    """Share of the votes for chosen; a tie counts as half a vote."""
    votes: list[int] | None
    """Number of votes for chosen, of votes for rejected, and of ties."""
    annotators: list[str] | None
    """Names of the annotators."""
    labels: list[float] | None
    """Vote of each annotator: 1 for chosen, 0 for rejected, ½ for a tie."""


def read_judgement(row: Mapping[str, Any], where: str) -> Judgement:
    """
    The judgement that a row of preferences holds.

    It is in `chosen_prob`, or in `votes`, or in `annotators` with `annotator_votes`. With the first two, `annotator`
    names who judged. A row without any of them says that `chosen` was preferred.

    Votes and lists of annotators may be JSON text, as in the cells of a CSV file.

    Args:
        row (`Mapping[str, Any]`): a row of the dataset.
        where (`str`): the row's name in errors.

    Raises:
        `ValueError`: if a probability is outside of [0, 1], votes are negative or none, or columns contradict each
            other.
    """
    row = {column: _cell(row[column]) if column in _LISTS else row[column] for column in row}
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


def parsed_literal(text: str) -> Any:
    """The value that a cell of a CSV file holds as JSON or as a Python literal; None for any other text."""
    if not text.strip().startswith(("[", "{")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _cell(value: Any) -> Any:
    parsed = parsed_literal(value) if isinstance(value, str) else None
    return value if parsed is None else parsed


def _by_annotators(row: Mapping[str, Any], where: str) -> Judgement:
    names: Any = row.get("annotators")
    said: Any = row["annotator_votes"]
    lists = all(isinstance(column, Sequence) and not isinstance(column, str) for column in (names, said))
    if not lists or len(names) != len(said) or not said:
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
    unknown = set(votes) - set(_VOTES) if isinstance(votes, Mapping) else ()
    if unknown:
        raise ValueError(
            f"`votes` must count 'chosen', 'rejected' and 'tie', got {sorted(map(str, unknown))[0]!r} in {where}. "
            "Rename it, or leave it out."
        )
    if isinstance(votes, Mapping):
        counts = [
            votes.get(name) or 0 for name in _VOTES
        ]  # `datasets` fills in None for a name that only other rows have
    else:
        counts = list(votes) if isinstance(votes, Sequence) and not isinstance(votes, str) else []
    if len(counts) == 2:
        counts = [*counts, 0]
    counts: Any = [int(count) if isinstance(count, float) and count.is_integer() else count for count in counts]
    whole = all(isinstance(count, int) and count >= 0 for count in counts)
    if len(counts) != 3 or not whole or not sum(counts):
        raise ValueError(
            f"`votes` must count the votes for chosen, for rejected and the ties, at least one in all, got {votes!r} "
            f"in {where}. Drop pairs that nobody judged."
        )
    return counts


def check_pairs(name: str, dataset: Any) -> None:
    """
    Refuse preference data that nothing can be learnt from, and warn of rows that look wrong.

    Args:
        name (`str`): the dataset's name in errors.
        dataset (`Dataset`, or a mapping of several):
            Pairs, as texts or token ids. The rows of a stream, which has no length, are checked when they are read.

    Raises:
        `ValueError`: if a column is missing, there are no rows, or all are ties.
        `TypeError`: if a text is neither a string nor a list of messages.
    """
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_pairs(f"{name}['{key}']", part)
        return
    columns = getattr(dataset, "column_names", None)
    if columns is None:  # a stream that does not know its columns
        return
    tokenised = next((pair for pair in _TOKENISED if set(pair) <= set(columns)), None)
    if not tokenised and not {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            f"`{name}` must have the columns `chosen` and `rejected`, got {list(columns)}. Rename those that hold the "
            f"preferred and the other text: `dataset.rename_column({(columns or ['better'])[0]!r}, 'chosen')`."
        )
    if not isinstance(dataset, Dataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"`{name}` must hold at least one pair, got none. Check the split and the filters before it.")
    _check_texts(name, dataset, tokenised or ("chosen", "rejected"))
    if "margin" in columns:
        _check_margins(name, dataset["margin"])
    if set(columns) & set(JUDGEMENT_COLUMNS):
        judged: Any = dataset.select_columns([column for column in columns if column in JUDGEMENT_COLUMNS])
        probs = [read_judgement(row, f"`{name}` row {index}").chosen_prob for index, row in enumerate(judged)]
        if all(prob == 0.5 for prob in probs):
            raise ValueError(
                f"`{name}` must hold at least one pair that is not a tie, got {len(dataset)} ties: no reward follows "
                "from them. Check how votes were mapped."
            )


def _check_margins(name: str, margins: Sequence[Any]) -> None:
    for index, margin in enumerate(margins):
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
            raise ValueError(
                f"`margin` must be a finite number, got {margin!r} in `{name}` row {index}. Use 0 for a pair without "
                "one, or remove the column."
            )


def _check_texts(name: str, dataset: Dataset, columns: tuple[str, str]) -> None:
    identical = empty = 0
    chosen, rejected = columns
    pairs: Any = dataset.select_columns(list(columns))
    for index, row in enumerate(pairs):
        for column, text in row.items():
            if not isinstance(text, (str, list)):
                raise TypeError(
                    f"`{column}` must hold texts or lists of chat messages, got {text!r} in `{name}` row {index}. "
                    "Drop or convert such rows."
                )
        identical += row[chosen] == row[rejected]
        empty += not row[chosen] or not row[rejected]
    if identical == len(dataset):
        raise ValueError(
            f"`{name}` must hold at least one pair of different texts, got {identical} pairs of identical ones. Check "
            "which columns were taken for `chosen` and `rejected`."
        )
    if identical:
        logger.warning(
            f"{identical} of {len(dataset)} pairs in `{name}` have identical texts. They are kept, teach nothing, and "
            f"lower the accuracy: drop them with `dataset.filter(lambda row: row['{chosen}'] != row['{rejected}'])`."
        )
    if empty and chosen != "chosen":
        raise ValueError(
            f"`{name}` must hold at least one token a text, got none in {empty} of {len(dataset)} pairs: a reward is "
            "read off the last token. Drop them, or let the trainer tokenise the texts, which appends EOS."
        )
    if empty:
        logger.warning(
            f"{empty} of {len(dataset)} pairs in `{name}` have an empty text. They are kept: the reward of an empty "
            "answer is learnt. Drop them if the text was lost on the way."
        )
