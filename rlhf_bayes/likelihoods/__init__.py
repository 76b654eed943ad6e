"""Evidence: what a completion says about the posterior, in nats."""

from rlhf_bayes.likelihoods.classifier import ClassifierLikelihood
from rlhf_bayes.likelihoods.combine import combine_rewards
from rlhf_bayes.likelihoods.ensemble import EnsembleLikelihood
from rlhf_bayes.likelihoods.protocol import Likelihood
from rlhf_bayes.likelihoods.reward import RewardLikelihood, check_beta

__all__ = [
    "ClassifierLikelihood",
    "EnsembleLikelihood",
    "Likelihood",
    "RewardLikelihood",
    "check_beta",
    "combine_rewards",
]
