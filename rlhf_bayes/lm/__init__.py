"""A causal LM as a distribution over completions."""

from rlhf_bayes.lm.completions import Completion, Completions, Prompt
from rlhf_bayes.lm.critic import Critic
from rlhf_bayes.lm.fitted_critic import FittedCritic
from rlhf_bayes.lm.forward import CompletionScores, enable_completion_scoring, score_completions
from rlhf_bayes.lm.language_model import LanguageModel
from rlhf_bayes.lm.vllm_model import VLLMLanguageModel

__all__ = [
    "Completion",
    "CompletionScores",
    "Completions",
    "Critic",
    "FittedCritic",
    "LanguageModel",
    "Prompt",
    "VLLMLanguageModel",
    "enable_completion_scoring",
    "score_completions",
]
