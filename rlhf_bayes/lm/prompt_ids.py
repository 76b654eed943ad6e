"""Token ids of prompts, which must not end with EOS."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def ends_texts_with_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's post-processor appends EOS to every text."""
    eos, text = tokenizer.eos_token_id, "a"
    with_special: Any = tokenizer(text)["input_ids"]
    without: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(with_special) and with_special[-1] == eos and (not without or without[-1] != eos)


def without_final_eos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt's token ids without the EOS that the post-processor appended: no completion would follow it."""
    return list(ids[:-1]) if len(ids) and ids[-1] == tokenizer.eos_token_id else list(ids)
