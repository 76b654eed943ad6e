"""Completions are scored in micro-batches of like length, and come back in their own order."""

import torch

from rlhf_bayes.trainers.rollout.scored_rollout import scored_by_length

LENGTHS = [5, 1, 4, 1, 3, 2]


def test_scores_come_back_in_the_order_of_the_rows():
    ids = torch.arange(6)[:, None].expand(6, 6)
    sequences = (ids[:, :2], torch.ones(6, 2, dtype=torch.bool), ids, torch.arange(6) < torch.tensor(LENGTHS)[:, None])
    widths = []

    def score_rows(prompt_ids, prompt_mask, completion_ids, completion_mask, model_inputs):
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
