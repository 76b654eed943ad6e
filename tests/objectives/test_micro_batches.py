"""Rows of like length together: none lost, none changed, and less padding."""

import torch

from rlhf_bayes.objectives.micro_batches import by_length, scored_by_length

LENGTHS = [5, 1, 4, 1, 3, 2]


def mask(lengths, width=6):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def micro_batches(sizes=(2, 2, 2)):
    rows = torch.arange(len(LENGTHS)).split(sizes)
    return [
        {
            "prompt_mask": torch.ones(len(row), 2, dtype=torch.bool),
            "completion_mask": mask([LENGTHS[i] for i in row]),
            "row": row,
            "beta": torch.tensor(0.5),
            "old_values": None,
        }
        for row in rows
    ]


def test_rows_are_dealt_in_order_of_length():
    batches = by_length(micro_batches())
    assert [batch["row"].tolist() for batch in batches] == [[1, 3], [5, 4], [2, 0]]
    for batch in batches:
        assert batch["completion_mask"].sum(-1).tolist() == [LENGTHS[i] for i in batch["row"]]
        assert batch["beta"] == 0.5
        assert batch["old_values"] is None


def test_the_prompt_counts():
    batches = micro_batches()
    batches[0]["prompt_mask"] = torch.tensor([[False, True], [False, False]])
    assert [batch["row"].tolist() for batch in by_length(batches)] == [[1, 3], [5, 4], [0, 2]]


def test_sizes_stay_and_the_rollout_is_left_as_it_was():
    batches = micro_batches((1, 3, 2))
    assert [len(batch["row"]) for batch in by_length(batches)] == [1, 3, 2]
    assert [batch["row"].tolist() for batch in batches] == [[0], [1, 2, 3], [4, 5]]


def test_scores_come_back_in_the_order_of_the_rows():
    ids = torch.arange(6)[:, None].expand(6, 6)
    sequences = (ids[:, :2], torch.ones(6, 2, dtype=torch.bool), ids, mask(LENGTHS))
    widths = []

    def score_rows(prompt_ids, prompt_mask, completion_ids, completion_mask):
        widths.append(int(completion_mask.sum(-1).max()))
        return {"row": completion_ids[:, 0], "length": completion_mask.sum(-1), "values": None}

    scored = scored_by_length(score_rows, sequences, 2)
    assert scored["row"].tolist() == [0, 1, 2, 3, 4, 5]
    assert scored["length"].tolist() == LENGTHS
    assert scored["values"] is None
    assert widths == [1, 3, 5]
    widths.clear()
    assert scored_by_length(score_rows, sequences, 6)["row"].tolist() == [0, 1, 2, 3, 4, 5]
    assert widths == [5]
