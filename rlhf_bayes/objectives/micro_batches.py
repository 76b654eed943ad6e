"""Which rows go through the model together: those of like length, so that little of it is padding."""

from collections.abc import Callable

import torch
from torch import Tensor


def columns_of_rows(batch: dict[str, Tensor]) -> list[str]:
    """Names of the tensors of a batch that have a row for each completion."""
    rows = len(batch["completion_mask"])
    return [name for name, tensor in batch.items() if tensor is not None and tensor.dim() > 0 and len(tensor) == rows]


def by_length(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """
    The same rows in micro-batches of the same sizes, shortest first.

    Args:
        batches (`list[dict[str, Tensor]]`):
            With `prompt_mask` (B, P) and `completion_mask` (B, T) among others. What has a row for each completion is
            dealt anew; the rest stays in place.
    """
    if len(batches) == 1:
        return batches
    sizes = [len(batch["completion_mask"]) for batch in batches]
    lengths = torch.cat([batch["prompt_mask"].sum(-1) + batch["completion_mask"].sum(-1) for batch in batches])
    order = lengths.argsort(stable=True)
    dealt = [dict(batch) for batch in batches]
    for name in columns_of_rows(batches[0]):
        parts = torch.cat([batch[name] for batch in batches])[order].split(sizes)
        for batch, part in zip(dealt, parts, strict=True):
            batch[name] = part
    return dealt


def scored_by_length(
    score_rows: Callable[..., dict[str, Tensor | None]], sequences: tuple[Tensor, ...], batch_size: int
) -> dict[str, Tensor | None]:
    """
    The columns that `score_rows` computes for all rows, `batch_size` rows at a time, in the order of the rows.

    Args:
        score_rows (`Callable`):
            Computes columns from prompt_ids, prompt_mask, completion_ids and completion_mask of some rows.
        sequences (`tuple[Tensor, ...]`):
            These four for all rows: (B, P), (B, P), (B, T), (B, T).
        batch_size (`int`):
            Number of rows in each call.
    """
    _, prompt_mask, _, completion_mask = sequences
    order = torch.arange(len(prompt_mask), device=prompt_mask.device)
    if batch_size < len(order):
        order = (prompt_mask.sum(-1) + completion_mask.sum(-1)).argsort(stable=True)
    parts = [score_rows(*(tensor[rows] for tensor in sequences)) for rows in order.split(batch_size)]
    back = order.argsort()
    joined: dict[str, Tensor | None] = {}
    for name in parts[0]:
        tensors = [tensor for part in parts if (tensor := part[name]) is not None]  # None in one part is None in all
        joined[name] = torch.cat(tensors)[back] if tensors else None
    return joined
