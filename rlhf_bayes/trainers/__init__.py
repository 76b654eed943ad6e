"""Layer 3: trainers, drop-in for TRL's."""

from .metrics import posterior_metrics
from .ppo_config import PPOConfig
from .ppo_trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "posterior_metrics"]
