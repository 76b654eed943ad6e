"""Draws the rest of completions from a prefix."""

from collections.abc import Sequence

import torch

from rlhf_bayes.lm.completions import Prompt
from rlhf_bayes.lm.forward import base_causal_lm
from rlhf_bayes.lm.generation import raw_generation_config
from rlhf_bayes.lm.language_model import LanguageModel, seeded_by


@torch.no_grad()
def regrow(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    prefixes: Sequence[Sequence[int]],
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """
    Completions drawn given their beginnings: x ~ π(x | prompt, x_<i).

    Args:
        lm (`LanguageModel`):
            π.
        prompts (`Sequence` of `str` or of chats):
            B prompts.
        prefixes (`Sequence[Sequence[int]]`):
            B beginnings of completions: fewer than `max_completion_length` tokens, none of them EOS, perhaps empty.
        generator (`torch.Generator`, *optional*):
            Makes the draws reproducible.

    Returns:
        `list[list[int]]`: B completions, prefix included.
    """
    prompt_ids = lm.prompt_token_ids(prompts)
    context = getattr(base_causal_lm(lm.model).config.get_text_config(), "max_position_embeddings", None) or 2**62
    rows = sorted(range(len(prompts)), key=lambda row: len(prefixes[row]))
    completions: dict[int, list[int]] = {}
    with seeded_by(generator, lm.device), raw_generation_config(lm.model):
        while rows:
            # the shortest prefix of a batch determines its steps; rows with longer ones must still have positions
            steps = lm.max_completion_length - len(prefixes[rows[0]])
            fits = [row for row in rows if len(prompt_ids[row]) + len(prefixes[row]) + steps <= context]
            batch = fits[: lm.batch_size]
            beginnings = [[*prompt_ids[row], *prefixes[row]] for row in batch]
            for row, drawn in zip(batch, lm.generate_ids(beginnings, steps), strict=True):
                completions[row] = [*prefixes[row], *drawn][: lm.max_completion_length]
            rows = [row for row in rows if row not in completions]
    return [completions[row] for row in range(len(prompts))]
