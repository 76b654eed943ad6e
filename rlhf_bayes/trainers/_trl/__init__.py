"""All contact with TRL's private names: one module for each TRL trainer that ours extend."""

from .preferences import PairRewards, PreferenceTrainer
from .rollouts import Rollout, RolloutTrainer

__all__ = ["PairRewards", "PreferenceTrainer", "Rollout", "RolloutTrainer"]
