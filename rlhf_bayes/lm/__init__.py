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
from .decoding import CachedTrunk, Decoding, Past, PrefixReader, cache_name, draw_tokens, generator_on, joined
from .forward import (
    CompletionScores,
    base_causal_lm,
    enable_completion_scoring,
    scatter,
    score_completions,
)
from .generation import first_eos_mask, raw_generation_config, remove_dropout, sampling_config
from .head import LMHead, token_log_probs_and_entropy, token_log_probs_and_exact_kl
from .language_model import (
    Completion,
    Completions,
    LanguageModel,
    Prompt,
    as_completion,
    check_prompt_fits,
    eos_token_ids,
    pad_ids,
)
from .vllm_model import VLLMLanguageModel

__all__ = [
    "CRITIC",
    "CachedTrunk",
    "Completion",
    "CompletionScores",
    "Completions",
    "Critic",
    "Decoding",
    "LMHead",
    "LanguageModel",
    "Past",
    "PrefixReader",
    "Prompt",
    "VLLMLanguageModel",
    "active_adapter",
    "as_completion",
    "base_causal_lm",
    "cache_name",
    "check_prompt_fits",
    "critic_config",
    "detached_critic",
    "draw_tokens",
    "enable_completion_scoring",
    "eos_token_ids",
    "first_eos_mask",
    "generator_on",
    "is_critic_folder",
    "joined",
    "kept_trainable",
    "pad_ids",
    "raw_generation_config",
    "regrow",
    "remove_dropout",
    "sampling_config",
    "scatter",
    "score_completions",
    "set_trainable",
    "split_critic",
    "token_log_probs_and_entropy",
    "token_log_probs_and_exact_kl",
]
