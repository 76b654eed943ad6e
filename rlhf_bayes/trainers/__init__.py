"""Trainers that take the place of TRL's."""

from rlhf_bayes.objectives.posterior_metrics import posterior_metrics, target_metrics
from rlhf_bayes.trainers.gdc.gdc_config import GDCConfig
from rlhf_bayes.trainers.gdc.gdc_trainer import GDCTrainer
from rlhf_bayes.trainers.ppo.ppo_config import PPOConfig
from rlhf_bayes.trainers.ppo.ppo_trainer import PPOTrainer
from rlhf_bayes.trainers.reward.reward_config import RewardConfig
from rlhf_bayes.trainers.reward.reward_trainer import RewardTrainer

__all__ = [
    "GDCConfig",
    "GDCTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "posterior_metrics",
    "target_metrics",
]
