"""All contact with TRL's private names: one module for each TRL trainer that ours extend."""

from .preferences import PairRewards, PreferenceTrainer
from .rollout import Rollout
from .rollouts import RolloutTrainer

__all__ = ["PairRewards", "PreferenceTrainer", "Rollout", "RolloutTrainer"]
