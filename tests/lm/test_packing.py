"""Where sequences stand in packed rows."""

import pytest
import torch

from rlhf_bayes.lm.packing import layout, packed


@pytest.mark.parametrize("lengths", [[3], [2, 2, 2], [5, 1, 4, 2, 3], [1] * 7, [9, 8, 1]])
def test_rows_hold_each_sequence_once_and_are_no_longer_than_the_longest(lengths):
    starts, rows, width = layout(lengths, one_row=False)
    assert width == max(lengths)
    taken = [start + offset for start, length in zip(starts, lengths, strict=True) for offset in range(length)]
    assert len(set(taken)) == len(taken)
    assert max(taken) < rows * width
    for start, length in zip(starts, lengths, strict=True):
        assert start // width == (start + length - 1) // width  # none goes on in the next row
    assert rows <= len(lengths)


def test_one_row_has_no_room_between_sequences():
    starts, rows, width = layout([2, 5, 1], one_row=True)
    assert (rows, width) == (1, 8)
    assert starts == [5, 0, 7]


def test_short_sequences_share_the_rows_that_longer_ones_leave():
    assert layout([1, 4, 2, 3, 2], one_row=False) == ([7, 0, 8, 4, 10], 3, 4)


def test_tokens_without_their_padding_and_positions_from_0():
    ids = torch.tensor([[9, 9, 3, 4, 9], [9, 5, 6, 7, 8], [9, 9, 2, 9, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0]]).bool()
    rows = packed(ids, mask, [2, 4, 1], one_row=False)
    assert rows.input_ids.tolist() == [[5, 6, 7, 8], [3, 4, 2, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert rows.slots.tolist() == [[8, 8, 4, 5, 8], [8, 0, 1, 2, 3], [8, 8, 6, 8, 8]]
