"""What a script's flags name: data, rewards and features. Wrong names are refused before a model is loaded."""

from .data import hold_out, load_preferences, load_prompts, prompts_of_pairs
from .features import contains_words, parse_features
from .named import load_function, load_language_model, load_pooled_reward, load_reward_func
from .recipe import (
    PromptArguments,
    draw_before_and_after,
    model_init_kwargs,
    parse_flags,
    reward_report,
    train_and_report,
)

__all__ = [
    "PromptArguments",
    "contains_words",
    "draw_before_and_after",
    "hold_out",
    "load_function",
    "load_language_model",
    "load_pooled_reward",
    "load_preferences",
    "load_prompts",
    "load_reward_func",
    "model_init_kwargs",
    "parse_features",
    "parse_flags",
    "prompts_of_pairs",
    "reward_report",
    "train_and_report",
]
