"""Typed batches: rows taken, split, joined and ordered by length, none lost and none changed."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rlhf_bayes.objectives.batch import Batch, by_length, joined

LENGTHS = [5, 1, 4, 1, 3, 2]


@dataclass(frozen=True)
class NumberedBatch(Batch):
    row: Tensor
    beta: Tensor
    old_values: Tensor | None = None


def numbered(lengths=LENGTHS, prompt_width=2):
    """Completion i holds the token 10 + i, its prompt the token i."""
    rows = torch.arange(len(lengths))
    width = max(lengths)
    return NumberedBatch(
        prompt_ids=rows[:, None].expand(-1, prompt_width),
        prompt_mask=torch.ones(len(lengths), prompt_width, dtype=torch.bool),
        completion_ids=10 + rows[:, None].expand(-1, width),
        completion_mask=torch.arange(width) < torch.tensor(lengths)[:, None],
        row=rows,
        beta=torch.tensor(0.5),
    )


def test_rows_are_dealt_in_order_of_length():
    batches = by_length(numbered().split([2, 2, 2]))
    assert [batch.row.tolist() for batch in batches] == [[1, 3], [5, 4], [2, 0]]
    for batch in batches:
        assert batch.completion_mask.sum(-1).tolist() == [LENGTHS[i] for i in batch.row]
        assert batch.completion_ids[:, 0].tolist() == [10 + i for i in batch.row]
        assert batch.beta == 0.5
        assert batch.old_values is None


def test_the_prompt_counts():
    batch = numbered()
    batch.prompt_mask[0], batch.prompt_mask[1] = torch.tensor([False, True]), torch.tensor([False, False])
    assert [part.row.tolist() for part in by_length(batch.split([2, 2, 2]))] == [[1, 3], [5, 4], [0, 2]]


def test_sizes_stay_and_the_rollout_is_left_as_it_was():
    batches = numbered().split([1, 3, 2])
    assert [len(batch) for batch in by_length(batches)] == [1, 3, 2]
    assert [batch.row.tolist() for batch in batches] == [[0], [1, 2, 3], [4, 5]]


def test_joining_pads_prompts_on_the_left_and_completions_on_the_right():
    whole = joined([numbered([2, 1], prompt_width=1), numbered([3], prompt_width=3)])
    assert whole.prompt_mask.long().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1]]
    assert whole.completion_mask.long().tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert whole.row.tolist() == [0, 1, 0]
    assert whole.beta == 0.5


def test_columns_go_there_and_back():
    columns = numbered().columns()
    assert "old_values" not in columns
    again = NumberedBatch.from_columns(columns | {"advantages": torch.zeros(6)})  # a host has columns of its own
    assert all(torch.equal(getattr(again, name), tensor) for name, tensor in columns.items())
    del columns["row"]
    with pytest.raises(TypeError, match="row"):
        NumberedBatch.from_columns(columns)


def test_inputs_of_images_stay_with_their_rows():
    batch = replace(numbered(), model_inputs=[{"pixel_values": torch.tensor([row])} for row in range(6)])

    def rows_of(*batches):
        return [[int(inputs["pixel_values"]) for inputs in batch.model_inputs] for batch in batches]

    assert rows_of(*batch.split([1, 3, 2])) == [[0], [1, 2, 3], [4, 5]]
    assert rows_of(batch.take(torch.tensor([4, 0]))) == [[4, 0]]
    ordered = by_length(batch.split([2, 2, 2]))
    assert rows_of(*ordered) == [part.row.tolist() for part in ordered] == [[1, 3], [5, 4], [2, 0]]
    with pytest.raises(ValueError, match="Batches must have the same fields to be joined"):
        joined([numbered(), batch])
