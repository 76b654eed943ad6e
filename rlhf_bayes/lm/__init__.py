"""Layer 1: a causal LM as a distribution over completions."""

from .continuation import regrow
from .critic import (
    CRITIC,
    Critic,
    active_adapter,
    critic_config,
    detached_critic,
    is_critic_folder,
    kept_trainable,
    set_trainable,
    split_critic,
)
from .forward import (
    CompletionScores,
    base_causal_lm,
    enable_completion_scoring,
    scatter,
    score_completions,
)
from .generation import first_eos_mask, raw_generation_config, sampling_config
from .head import LMHead, token_log_probs_and_entropy, token_log_probs_and_exact_kl
from .language_model import (
    Completion,
    Completions,
    LanguageModel,
    Prompt,
    as_completion,
    check_prompt_fits,
    eos_token_ids,
)

__all__ = [
    "CRITIC",
    "Completion",
    "CompletionScores",
    "Completions",
    "Critic",
    "LMHead",
    "LanguageModel",
    "Prompt",
    "active_adapter",
    "as_completion",
    "base_causal_lm",
    "check_prompt_fits",
    "critic_config",
    "detached_critic",
    "enable_completion_scoring",
    "eos_token_ids",
    "first_eos_mask",
    "is_critic_folder",
    "kept_trainable",
    "raw_generation_config",
    "regrow",
    "sampling_config",
    "scatter",
    "score_completions",
    "set_trainable",
    "split_critic",
    "token_log_probs_and_entropy",
    "token_log_probs_and_exact_kl",
]
