"""Evidence: what a completion says about the posterior, in nats."""

from rlhf_bayes.likelihoods.combine import combine_rewards

__all__ = ["combine_rewards"]
