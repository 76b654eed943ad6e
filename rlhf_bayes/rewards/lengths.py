"""The longest text that a reward model reads: one rule for training, evaluating and scoring."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

logger = logging.getLogger(__name__)

OVERLONG = ("drop", "truncate", "error")
# in these families position ids start after the padding index (1), so two of the positions are never used
_POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
_ROWS_SHOWN = 5


def num_positions(config: Any) -> int | None:
    """The number of tokens that a model has positions for, from its config; None where the config sets no limit."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - 2 if config.model_type in _POSITIONS_AFTER_PADDING else positions


@final
@dataclass(frozen=True)
class LengthLimit:
    """
    The longest text, in tokens: the user's limit, but at most as many as the model has positions for.

    Beyond its positions a model with learnt positions fails, and one with rotary positions was not trained.

    Args:
        max_length (`int`, *optional*): The user's limit.
        positions (`int`, *optional*): The model's limit, from [`num_positions`].
    """

    max_length: int | None = None
    positions: int | None = None

    @property
    def tokens(self) -> int | None:
        """The smaller of the two limits; None for no limit."""
        return min((limit for limit in (self.max_length, self.positions) if limit is not None), default=None)

    @property
    def by_model(self) -> bool:
        """Whether the model's limit is the smaller one."""
        return self.positions is not None and self.tokens == self.positions and self.max_length != self.positions

    def allows(self, length: int) -> bool:
        """Whether a text of `length` tokens is short enough."""
        return self.tokens is None or length <= self.tokens

    def __str__(self) -> str:
        return f"the model's {self.tokens} positions" if self.by_model else f"`max_length` = {self.tokens} tokens"

    @property
    def advice(self) -> str:
        """A sentence that says how to raise the limit."""
        return "Take a model with more positions" if self.by_model else "Raise `max_length`"


def shown_rows(rows: Sequence[int]) -> str:
    """The numbers of the first few rows, for a message."""
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN]))
    return f"row{'s' if len(rows) > 1 else ''} {shown}{', …' if len(rows) > _ROWS_SHOWN else ''}"


def overlong_rows(what: str, rows: Sequence[int], num_rows: int, limit: LengthLimit, overlong: str) -> None:
    """
    Warn of rows with a text that is too long, or refuse them.

    Args:
        what (`str`): a description of the rows: "pairs in `train`".
        rows (`Sequence[int]`): their numbers in the dataset.
        num_rows (`int`): rows in the dataset.
        limit ([`LengthLimit`]): the longest text.
        overlong (`str`): `"drop"`, `"truncate"` or `"error"`.

    Raises:
        `ValueError`: if `overlong` is `"error"`, or no row would be left.
    """
    if not rows:
        return
    found = f"{len(rows)} of {num_rows} {what} have a text of more than {limit}: {shown_rows(rows)}"
    if overlong == "error":
        raise ValueError(f"{found}. {limit.advice}, or set `overlong` to 'drop' or 'truncate'.")
    if overlong == "truncate":
        logger.warning(f"{found}. The last {limit.tokens} tokens are kept.")
        return
    if len(rows) == num_rows:
        raise ValueError(
            f"{found}. With `overlong='drop'` none is left. {limit.advice}, or set `overlong='truncate'`."
        )
    logger.warning(f"{found}. They are dropped. {limit.advice}, or set `overlong='truncate'` to keep their end.")


def identical_rows(what: str, rows: Sequence[int], num_rows: int, limit: LengthLimit) -> None:
    """
    Warn of pairs that differ only in what was cut off, or refuse data in which all pairs do.

    Args:
        what (`str`): a description of the rows: "pairs in `train`".
        rows (`Sequence[int]`): their numbers in the dataset.
        num_rows (`int`): rows in the dataset that differed before.
        limit ([`LengthLimit`]): the longest text, to which they were cut.

    Raises:
        `ValueError`: if all pairs are so.
    """
    if not rows:
        return
    found = (
        f"{len(rows)} of {num_rows} {what} have the same last {limit.tokens} tokens in both texts, since "
        f"`overlong='truncate'` cuts off where they differ: {shown_rows(rows)}"
    )
    if len(rows) == num_rows:
        raise ValueError(f"{found}. Nothing follows from them. {limit.advice}, or set `overlong='drop'`.")
    logger.warning(f"{found}. They are kept, teach nothing, and lower the accuracy. {limit.advice}.")
