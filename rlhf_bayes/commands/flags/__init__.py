"""Loads what a script's flags name: data, rewards and features. Wrong names are refused before a model is loaded."""

from rlhf_bayes.commands.flags.data import hold_out, load_preferences, load_prompts, prompts_of_pairs
from rlhf_bayes.commands.flags.features import contains_words, parse_features
from rlhf_bayes.commands.flags.named import (
    load_function,
    load_language_model,
    load_likelihood,
    load_pooled_reward,
    load_reward_func,
)
from rlhf_bayes.commands.flags.recipe import (
    PromptArguments,
    evaluate_saved,
    evidence_report,
    likelihood_report,
    model_init_kwargs,
    parse_flags,
    print_samples,
    reward_report,
    save_evaluation,
    train_and_report,
)

__all__ = [
    "PromptArguments",
    "contains_words",
    "evaluate_saved",
    "evidence_report",
    "hold_out",
    "likelihood_report",
    "load_function",
    "load_language_model",
    "load_likelihood",
    "load_pooled_reward",
    "load_preferences",
    "load_prompts",
    "load_reward_func",
    "model_init_kwargs",
    "parse_features",
    "parse_flags",
    "print_samples",
    "prompts_of_pairs",
    "reward_report",
    "save_evaluation",
    "train_and_report",
]
