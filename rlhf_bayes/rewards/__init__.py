"""Reward functions in TRL's protocol: checked, and run on completions."""

from rlhf_bayes.rewards.classifier import TextClassifier
from rlhf_bayes.rewards.index import RewardIndex
from rlhf_bayes.rewards.model import RewardModel
from rlhf_bayes.rewards.normalization import Normalization
from rlhf_bayes.rewards.scoring import RewardFunc, RewardScorer, check_rows, score
from rlhf_bayes.rewards.validation import checked

__all__ = [
    "Normalization",
    "RewardFunc",
    "RewardIndex",
    "RewardModel",
    "RewardScorer",
    "TextClassifier",
    "check_rows",
    "checked",
    "score",
]
