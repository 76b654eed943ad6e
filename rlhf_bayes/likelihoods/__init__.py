"""Evidence: what a completion says about the posterior, in nats."""

from rlhf_bayes.likelihoods.classifier_likelihood import ClassifierLikelihood
from rlhf_bayes.likelihoods.combine import combine_rewards
from rlhf_bayes.likelihoods.constraint import Constraint
from rlhf_bayes.likelihoods.ensemble_likelihood import EnsembleLikelihood
from rlhf_bayes.likelihoods.likelihood import (
    Evidence,
    Likelihood,
    checked_evidence,
    checked_log_likelihood,
    known_bound,
    known_forbids,
)
from rlhf_bayes.likelihoods.moment_likelihood import MomentLikelihood
from rlhf_bayes.likelihoods.moment_summary import MomentSummary
from rlhf_bayes.likelihoods.product_likelihood import ProductLikelihood
from rlhf_bayes.likelihoods.reward_likelihood import RewardLikelihood, check_beta

__all__ = [
    "ClassifierLikelihood",
    "Constraint",
    "EnsembleLikelihood",
    "Evidence",
    "Likelihood",
    "MomentLikelihood",
    "MomentSummary",
    "ProductLikelihood",
    "RewardLikelihood",
    "check_beta",
    "checked_evidence",
    "checked_log_likelihood",
    "combine_rewards",
    "known_bound",
    "known_forbids",
]
