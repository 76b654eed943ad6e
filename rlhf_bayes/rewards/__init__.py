"""Reward functions in TRL's protocol: checked, and run on completions."""

from rlhf_bayes.rewards.validation import checked

__all__ = ["checked"]
