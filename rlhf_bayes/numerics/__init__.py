"""Pure tensor functions: masked sums, KL estimators, GAE, log-weights, divergences, the clipped losses of PPO,
distributional policy gradients, the log-variance loss, exponential families with given moments, preferences and their
calibration, pooled rewards, best of n.

Nothing here knows of models, tokenizers or trainers. Log space, nats, fp32 (fp64 is kept; half precision is raised).
"""

from .best_of_n import best_of_n_kl, best_of_n_kl_bound, expected_best_of_n
from .calibration import ReliabilityBins, brier_score, expected_calibration_error, reliability_bins
from .divergences import forward_kl, jeffreys, js, reverse_kl, tv
from .dpg import BASELINES, DPGAdvantages, dpg_advantages, dpg_baselines
from .f_divergence import DIVERGENCES, check_divergence, f_divergence, f_divergence_terms, pseudo_rewards
from .gae import gae
from .groups import grouped, leave_one_out_baseline
from .jackknife import jackknife
from .kl import exact_token_kl, k1, k2, k3
from .log_variance import LogVarianceCentres, log_variance_centres, log_variance_loss
from .log_weights import (
    MIN_IMPORTANCE_ESS,
    importance_ess,
    khat,
    khat_threshold,
    log_importance_ess,
    log_z,
    log_z_standard_error,
)
from .masked import masked_mean, masked_sum, masked_var, masked_whiten
from .mcmc import effective_sample_size, rhat
from .mixture import log_fitted_mixture
from .moments import MomentFit, fit_moments
from .pooling import POOLING_RULES, pool, pool_centered, uses_beta
from .ppo import (
    adapted_beta,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    kl_penalised_advantages,
    prompt_baseline,
    token_rewards,
)
from .preferences import (
    agreement,
    bradley_terry_loss,
    noise_from_agreement,
    noisy_vote_loss,
    preference_metrics,
    smoothed,
    vote_error_prob,
    votes_to_prob,
)
from .proportions import clopper_pearson
from .quasi_rejection import QuasiRejectionCurve, quasi_rejection_curve
from .z_pool import ZPool

__all__ = [
    "BASELINES",
    "DIVERGENCES",
    "MIN_IMPORTANCE_ESS",
    "POOLING_RULES",
    "DPGAdvantages",
    "LogVarianceCentres",
    "MomentFit",
    "QuasiRejectionCurve",
    "ReliabilityBins",
    "ZPool",
    "adapted_beta",
    "agreement",
    "best_of_n_kl",
    "best_of_n_kl_bound",
    "bradley_terry_loss",
    "brier_score",
    "check_divergence",
    "clipped_policy_loss",
    "clipped_value_loss",
    "clopper_pearson",
    "dpg_advantages",
    "dpg_baselines",
    "effective_sample_size",
    "exact_token_kl",
    "expected_best_of_n",
    "expected_calibration_error",
    "explained_variance",
    "f_divergence",
    "f_divergence_terms",
    "fit_moments",
    "forward_kl",
    "gae",
    "grouped",
    "importance_ess",
    "jackknife",
    "jeffreys",
    "js",
    "k1",
    "k2",
    "k3",
    "khat",
    "khat_threshold",
    "kl_penalised_advantages",
    "leave_one_out_baseline",
    "log_fitted_mixture",
    "log_importance_ess",
    "log_variance_centres",
    "log_variance_loss",
    "log_z",
    "log_z_standard_error",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "noise_from_agreement",
    "noisy_vote_loss",
    "pool",
    "pool_centered",
    "preference_metrics",
    "prompt_baseline",
    "pseudo_rewards",
    "quasi_rejection_curve",
    "reliability_bins",
    "reverse_kl",
    "rhat",
    "smoothed",
    "token_rewards",
    "tv",
    "uses_beta",
    "vote_error_prob",
    "votes_to_prob",
]
