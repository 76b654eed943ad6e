"""Layer 3: what a gradient step minimises. No trainer, no trl and no accelerate in here."""

from rlhf_bayes.objectives.batch import Batch
from rlhf_bayes.objectives.f_divergence_objective import FDivergenceObjective
from rlhf_bayes.objectives.log_variance_objective import LogVarianceObjective
from rlhf_bayes.objectives.objective import LossSums, Objective, Step
from rlhf_bayes.objectives.posterior_target import PosteriorTarget
from rlhf_bayes.objectives.ppo_objective import PPOObjective
from rlhf_bayes.objectives.replay import ReplayBuffer
from rlhf_bayes.objectives.rollout import Rollout
from rlhf_bayes.objectives.world import OneProcess, World

__all__ = [
    "Batch",
    "FDivergenceObjective",
    "LogVarianceObjective",
    "LossSums",
    "Objective",
    "OneProcess",
    "PPOObjective",
    "PosteriorTarget",
    "ReplayBuffer",
    "Rollout",
    "Step",
    "World",
]
