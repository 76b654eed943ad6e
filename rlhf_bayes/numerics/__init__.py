"""Pure tensor functions: estimators, weights, divergences and losses.

Masked sums, KL estimators, GAE, log-weights, divergences, the clipped losses of PPO, distributional policy gradients,
the log-variance loss, exponential families with given moments, preferences and their calibration, pooled rewards, best
of n.

Nothing here knows of models, tokenizers or trainers. Log space, nats, fp32 (fp64 is kept; half precision is raised).
"""

from rlhf_bayes.numerics.bradley_terry import agreement, bradley_terry_loss, noise_from_agreement
from rlhf_bayes.numerics.calibration import brier_score, expected_calibration_error
from rlhf_bayes.numerics.divergences import forward_kl, jeffreys, js, reverse_kl, tv
from rlhf_bayes.numerics.f_divergence import DIVERGENCES, f_divergence
from rlhf_bayes.numerics.gae import gae
from rlhf_bayes.numerics.kl import exact_token_kl, k1, k2, k3
from rlhf_bayes.numerics.log_weights import importance_ess, khat, khat_threshold, log_z, log_z_standard_error
from rlhf_bayes.numerics.mcmc import effective_sample_size, rhat
from rlhf_bayes.numerics.moments import MomentFit, fit_moments
from rlhf_bayes.numerics.order_statistics import best_of_n_kl, best_of_n_kl_bound, expected_best_of_n
from rlhf_bayes.numerics.overoptimization import RewardLaw, fit_reward_law
from rlhf_bayes.numerics.pooling import POOLING_RULES, pool
from rlhf_bayes.numerics.proportions import clopper_pearson, clustered_proportion
from rlhf_bayes.numerics.quasi_rejection import quasi_rejection_curve
from rlhf_bayes.numerics.what_if import WhatIf, what_if

__all__ = [
    "DIVERGENCES",
    "POOLING_RULES",
    "MomentFit",
    "RewardLaw",
    "WhatIf",
    "agreement",
    "best_of_n_kl",
    "best_of_n_kl_bound",
    "bradley_terry_loss",
    "brier_score",
    "clopper_pearson",
    "clustered_proportion",
    "effective_sample_size",
    "exact_token_kl",
    "expected_best_of_n",
    "expected_calibration_error",
    "f_divergence",
    "fit_moments",
    "fit_reward_law",
    "forward_kl",
    "gae",
    "importance_ess",
    "jeffreys",
    "js",
    "k1",
    "k2",
    "k3",
    "khat",
    "khat_threshold",
    "log_z",
    "log_z_standard_error",
    "noise_from_agreement",
    "pool",
    "quasi_rejection_curve",
    "reverse_kl",
    "rhat",
    "tv",
    "what_if",
]
