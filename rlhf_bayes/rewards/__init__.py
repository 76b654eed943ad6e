"""Reward functions in TRL's protocol: models, ensembles, checks, and scoring of completions."""

from rlhf_bayes.rewards.index import RewardIndex
from rlhf_bayes.rewards.judgement import JUDGEMENT_COLUMNS, Judgement, check_pairs, read_judgement
from rlhf_bayes.rewards.normalization import Normalization
from rlhf_bayes.rewards.pooled_reward import PooledReward, PromptCenters, prompt_centers
from rlhf_bayes.rewards.prefix_rewards import takes_prefixes
from rlhf_bayes.rewards.reward_ensemble import EnsembleMember, RewardEnsemble, load_reward
from rlhf_bayes.rewards.reward_model import RewardModel
from rlhf_bayes.rewards.scoring import RewardFunc, RewardScorer, check_rows, score
from rlhf_bayes.rewards.text_classifier import TextClassifier
from rlhf_bayes.rewards.validation import checked

__all__ = [
    "JUDGEMENT_COLUMNS",
    "EnsembleMember",
    "Judgement",
    "Normalization",
    "PooledReward",
    "PromptCenters",
    "RewardEnsemble",
    "RewardFunc",
    "RewardIndex",
    "RewardModel",
    "RewardScorer",
    "TextClassifier",
    "check_pairs",
    "check_rows",
    "checked",
    "load_reward",
    "prompt_centers",
    "read_judgement",
    "score",
    "takes_prefixes",
]
