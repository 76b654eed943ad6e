"""Packs the sequences of a padded batch into fewer rows, told apart by position ids that start again at 0."""

from typing import NamedTuple

import torch
from torch import Tensor


class PackedRows(NamedTuple):
    """Sequences of a batch, one after the other in R rows of W tokens."""

    input_ids: Tensor
    """(R, W)."""
    position_ids: Tensor
    """(R, W): 0 at the first token of each sequence, and at what fills the end of a row."""
    slots: Tensor
    """(B, L): where each token of the batch stands among the R·W tokens; R·W for padding."""


def packed(ids: Tensor, mask: Tensor, lengths: list[int], one_row: bool) -> PackedRows:
    """
    Pack the sequences of a batch.

    Args:
        ids, mask (`Tensor` (B, L)):
            Tokens with padding on either side, and where there are tokens.
        lengths (`list[int]`):
            Tokens of each of the B sequences, at least one. The host knows them, so that it need not wait for the
            device.
        one_row (`bool`):
            Whether all are put into one row, as flash attention needs it. Otherwise a row is as long as the longest
            sequence: where attention makes a matrix of a whole row, it is then no larger than in a padded batch.
    """
    starts, rows, width = layout(lengths, one_row)
    positions = mask.long().cumsum(-1) - 1  # (B, L)
    first = torch.tensor(starts).to(ids.device, non_blocking=True)[:, None]  # (B, 1)
    slots = torch.where(mask.bool(), first + positions, rows * width)  # (B, L)
    # with one slot more, which takes the padding
    both = ids.new_zeros(2, rows * width + 1)
    both = both.scatter(1, slots.flatten().expand(2, -1), torch.stack([ids, positions]).flatten(1))
    input_ids, position_ids = both[:, :-1].view(2, rows, width)
    return PackedRows(input_ids, position_ids, slots)


def layout(lengths: list[int], one_row: bool) -> tuple[list[int], int, int]:
    """
    Where each sequence starts among the R·W tokens of packed rows, R, and W.

    The longest comes first, into the first row that has room ("first fit decreasing").
    """
    width = sum(lengths) if one_row else max(lengths)
    starts, used = [0] * len(lengths), []
    for sequence in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[sequence]
        row = next((row for row, tokens in enumerate(used) if tokens + length <= width), len(used))
        if row == len(used):
            used.append(0)
        starts[sequence] = row * width + used[row]
        used[row] += length
    return starts, len(used), width
