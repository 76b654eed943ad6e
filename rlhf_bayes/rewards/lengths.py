"""What is too long for a reward model: one rule for training, judging and scoring."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

logger = logging.getLogger(__name__)

OVERLONG = ("drop", "truncate", "error")
# their position ids start behind the padding index, so two of the positions (padding at 1) are never used
_POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
_ROWS_SHOWN = 5


def num_positions(config: Any) -> int | None:
    """Tokens that a model has positions for, from its config; None where the config sets no limit."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - 2 if config.model_type in _POSITIONS_AFTER_PADDING else positions


@final
@dataclass(frozen=True)
class LengthLimit:
    """
    The longest text, in tokens: what the user allows, and no more than the model has positions for.

    A model with rotary positions computes something beyond them, but it was not trained there, and a model with learnt
    positions fails.

    Args:
        max_length (`int`, *optional*): What the user allows.
        positions (`int`, *optional*): Those of the model, by [`num_positions`].
    """

    max_length: int | None = None
    positions: int | None = None

    @property
    def tokens(self) -> int | None:
        """The smaller of the two; None for no limit."""
        return min((limit for limit in (self.max_length, self.positions) if limit is not None), default=None)

    @property
    def by_model(self) -> bool:
        """Whether it is the model that sets the limit."""
        return self.positions is not None and self.tokens == self.positions and self.max_length != self.positions

    def allows(self, length: int) -> bool:
        """Whether a text of so many tokens is short enough."""
        return self.tokens is None or length <= self.tokens

    def __str__(self) -> str:
        return f"the model's {self.tokens} positions" if self.by_model else f"`max_length` = {self.tokens} tokens"

    @property
    def advice(self) -> str:
        """How to raise it."""
        return "Take a model with more positions" if self.by_model else "Raise `max_length`"


def shown_rows(rows: Sequence[int]) -> str:
    """Numbers of rows for a message: the first few."""
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN]))
    return f"row{'s' if len(rows) > 1 else ''} {shown}{', …' if len(rows) > _ROWS_SHOWN else ''}"


def overlong_rows(what: str, rows: Sequence[int], num_rows: int, limit: LengthLimit, overlong: str) -> None:
    """
    Report rows of which a text is too long, or refuse them.

    Args:
        what (`str`): what the rows are, and where: "pairs in `train`".
        rows (`Sequence[int]`): their numbers in the dataset.
        num_rows (`int`): rows in the dataset.
        limit ([`LengthLimit`]): what a text may have.
        overlong (`str`): `"drop"`, `"truncate"` or `"error"`.

    Raises:
        `ValueError`: `overlong="error"`, or none would be left.
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
    Report pairs that differ only in what was cut off, or refuse data of nothing else.

    Args:
        what (`str`): what the rows are, and where: "pairs in `train`".
        rows (`Sequence[int]`): their numbers in the dataset.
        num_rows (`int`): rows in the dataset that differed before.
        limit ([`LengthLimit`]): what was kept of a text.

    Raises:
        `ValueError`: there is no other pair.
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
