"""A column of a store as a reward function, so that likelihoods are made of what is stored."""

from typing import Any, final

STORED = "stored/"
"""Prefix of the columns that hold rewards and features where evidence is computed for the rows of a store."""


@final
class StoredColumn:
    """
    A reward or a feature of a store, in the protocol of TRL's reward functions.

    `RewardLikelihood(StoredColumn("helpful"), beta=0.1)`, `Constraint(StoredColumn("polite"))` and
    `MomentLikelihood({"short": StoredColumn("short")}, …)` are then evidence for the rows of a store, without the
    functions and models that gave the values.

    Args:
        name (`str`):
            Name of a reward function or of a feature of the store.
    """

    def __init__(self, name: str):
        self.name = self.__name__ = name

    def __call__(self, prompts: list, completions: list, completion_ids: list, **columns: Any) -> list[float | None]:
        if STORED + self.name not in columns:
            has = sorted(column.removeprefix(STORED) for column in columns if column.startswith(STORED))
            raise ValueError(
                f"`StoredColumn` must name a reward or a feature of the store, got {self.name!r}; there "
                f"{'are ' + ', '.join(has) if has else 'is none, since these are not the rows of a store'}."
            )
        return columns[STORED + self.name]
