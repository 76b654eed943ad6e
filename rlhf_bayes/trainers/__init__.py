"""Layer 3: trainers, drop-in for TRL's."""

from .gdc_config import GDCConfig
from .gdc_trainer import GDCTrainer
from .metrics import posterior_metrics, target_metrics
from .ppo_config import PPOConfig
from .ppo_trainer import PPOTrainer
from .reward_config import RewardConfig
from .reward_trainer import RewardTrainer

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
