"""Reward functions in TRL's protocol: checked, and run on completions."""

from rlhf_bayes.rewards.model import RewardModel
from rlhf_bayes.rewards.scoring import RewardFunc, RewardScorer, check_rows, score
from rlhf_bayes.rewards.validation import checked

__all__ = ["RewardFunc", "RewardModel", "RewardScorer", "check_rows", "checked", "score"]
