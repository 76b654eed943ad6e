"""What a vision-language model reads besides token ids: pixels and kinds of tokens, kept row by row."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

RowInputs = Mapping[str, Tensor]
"""The inputs of one prompt by name: pixels of all its images, and for each of its tokens what kind of token it is."""

# the images of a batch may differ in number and size; processors fill these up with zeros, and models ignore them
_FILLED_UP = ("pixel_values", "pixel_attention_mask")


def is_of_tokens(name: str) -> bool:
    """Whether an input has one value for each token of the prompt, rather than for its images."""
    return name.endswith("token_type_ids")


def collated(
    rows: Sequence[RowInputs], prompt_lengths: Sequence[int], prompt_width: int, completion_width: int, device: Any
) -> dict[str, Tensor]:
    """
    The inputs of a batch, in the order of its rows, as a processor makes them for padded prompts.

    Inputs of images are joined along their first dimension, where models expect all images of a batch. Inputs of
    tokens are 0 on padding and on completions, which are text.

    Args:
        rows (`Sequence[RowInputs]`):
            The inputs of each of B prompts. A prompt without images has none of images.
        prompt_lengths (`Sequence[int]`):
            Tokens of each prompt.
        prompt_width, completion_width (`int`):
            P and T: columns of the prompts, padded on the left, and of the completions, padded on the right.
        device (`torch.device`):
            The device of the results.

    Returns:
        `dict[str, Tensor]`: without the inputs that no row has.
    """
    inputs = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if is_of_tokens(name):
            whole = torch.zeros(len(rows), prompt_width + completion_width, dtype=torch.long)  # (B, P + T)
            for index, (row, length) in enumerate(zip(rows, prompt_lengths, strict=True)):
                if name in row:
                    whole[index, prompt_width - length : prompt_width] = row[name]
            inputs[name] = whole.to(device)
        else:
            inputs[name] = _joined([row[name] for row in rows if name in row], name).to(device)
    return inputs


def _joined(parts: list[Tensor], name: str) -> Tensor:
    if name in _FILLED_UP:
        sizes = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        parts = [pad(part, _missing(part, sizes)) for part in parts]
    return torch.cat(parts)


def _missing(part: Tensor, sizes: list[int]) -> list[int]:
    # `pad` takes the last dimension first, and of each the number before and after
    missing = [size - own for own, size in zip(part.shape[1:], sizes, strict=True)]
    return [number for size in reversed(missing) for number in (0, size)]
