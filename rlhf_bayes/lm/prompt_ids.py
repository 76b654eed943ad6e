"""Token ids of prompts, which must not end with EOS, and checks that prompts are text."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.head import excluded_tokens


def ends_texts_with_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's post-processor appends EOS to every text."""
    eos, text = tokenizer.eos_token_id, "a"
    with_special: Any = tokenizer(text)["input_ids"]
    without: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(with_special) and with_special[-1] == eos and (not without or without[-1] != eos)


def without_final_eos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt's token ids without the EOS that the post-processor appended: no completion would follow it."""
    return list(ids[:-1]) if len(ids) and ids[-1] == tokenizer.eos_token_id else list(ids)


def check_texts(prompts: Sequence[Any], reader: str) -> None:
    """
    Refuse chats with images where only text is read.

    Args:
        prompts (`Sequence` of `str` or of chats):
            The prompts.
        reader (`str`):
            Who reads them, for the error.

    Raises:
        ValueError: if a message holds a part that is no text.
    """
    for prompt in prompts:
        for message in [] if isinstance(prompt, str) else prompt:
            content = message.get("content")
            if isinstance(content, list) and any(part.get("type") != "text" for part in content):
                raise ValueError(
                    f"`prompts` must be texts or chats of texts for {reader}, which reads no images, got a message "
                    f"with parts of the types {[part.get('type') for part in content]}. Leave the others out."
                )


def check_reads_text(model: Any, tokenizer: Any) -> None:
    """
    Refuse processors of images, and models that a trainer trains on images.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model of a [`LanguageModel`].
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.

    Raises:
        ValueError: if the tokenizer is a processor, or the model excludes its image token from completions.
    """
    if isinstance(tokenizer, ProcessorMixin):
        raise ValueError(
            f"`tokenizer` must be a tokenizer, got {type(tokenizer).__name__}: a `LanguageModel` reads text only. "
            "Pass the processor's `.tokenizer` for prompts without images."
        )
    if excluded_tokens(base_causal_lm(model)):
        raise ValueError(
            f"`model_or_path` must draw every token, got a {type(base_causal_lm(model)).__name__} that a trainer "
            "trains on images, whose image token is excluded: its log-probs would be of another distribution than "
            "its draws. Save the policy and load it from there, for prompts without images."
        )
