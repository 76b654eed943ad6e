"""Inputs of images and tokens of a batch, put together from those of its rows."""

import torch
from torch.testing import assert_close

from rlhf_bayes.lm.model_inputs import collated


def test_images_follow_each_other_and_tokens_stand_over_their_prompts():
    rows = [
        {"pixel_values": torch.full((3, 2), 1.0), "token_type_ids": torch.tensor([1, 2])},
        {"token_type_ids": torch.tensor([0, 3, 0])},
        {"pixel_values": torch.full((1, 2), 2.0), "image_sizes": torch.tensor([[4, 5]])},
    ]
    inputs = collated(rows, [2, 3, 1], 4, 2, "cpu")
    assert inputs.keys() == {"pixel_values", "token_type_ids", "image_sizes"}
    assert inputs["pixel_values"].tolist() == [[1, 1]] * 3 + [[2, 2]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 1, 2, 0, 0], [0, 0, 3, 0, 0, 0], [0] * 6]
    assert inputs["image_sizes"].tolist() == [[4, 5]]


def test_images_of_other_numbers_and_sizes_are_filled_up_with_zeros():
    small, large = torch.ones(1, 1, 3, 2, 4), torch.ones(1, 2, 3, 5, 1)
    pixels = collated([{"pixel_values": small}, {"pixel_values": large}], [1, 1], 1, 1, "cpu")["pixel_values"]
    assert pixels.shape == (2, 2, 3, 5, 4)
    assert_close(pixels[0, :1, :, :2, :], small[0])
    assert_close(pixels[1, :, :, :, :1], large[0])
    assert pixels.sum() == small.sum() + large.sum()


def test_rows_of_text_have_no_inputs():
    assert collated([{}, {}], [1, 2], 2, 1, "cpu") == {}
