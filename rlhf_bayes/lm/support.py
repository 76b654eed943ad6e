"""Checks that two language models have the same prompts and completions."""

from typing import Any, cast

from rlhf_bayes.lm.language_model import LanguageModel


def check_same_support(name: str, lm: LanguageModel, prior: LanguageModel) -> None:
    """
    Refuse a model that draws other completions than the prior, or reads chats by another template.

    Args:
        name (`str`): Name of the argument that holds the model.
        lm ([`LanguageModel`]): The model.
        prior ([`LanguageModel`]): The prior.

    Raises:
        ValueError: if `max_completion_length`, EOS tokens, size of the vocabulary or `chat_template_kwargs` differ.
    """
    wanted, got = (
        (x.max_completion_length, sorted(x.eos_token_ids), len(cast(Any, x.tokenizer)), x.chat_template_kwargs)
        for x in (prior, lm)
    )
    if wanted != got:
        raise ValueError(
            f"`{name}` must draw completions of the prior's support: the same `max_completion_length`, EOS tokens, "
            f"size of the vocabulary and `chat_template_kwargs`, got {got} for {wanted}. Wrap the trained model with "
            "the prior's: `LanguageModel(policy, prior.tokenizer, prior.max_completion_length, "
            "chat_template_kwargs=prior.chat_template_kwargs)`."
        )
