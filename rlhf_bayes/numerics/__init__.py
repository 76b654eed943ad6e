"""Pure tensor functions: masked sums, KL estimators, GAE, log-weights, divergences, the clipped losses of PPO.

Nothing here knows of models, tokenizers or trainers. Log space, nats, fp32 (fp64 is kept; half precision is raised).
"""

from .divergences import forward_kl, jeffreys, js, reverse_kl, tv
from .gae import gae
from .kl import exact_token_kl, k1, k2, k3
from .log_weights import importance_ess, khat, khat_threshold, log_importance_ess, log_z, log_z_standard_error
from .masked import masked_mean, masked_sum, masked_var, masked_whiten
from .ppo import (
    adapted_beta,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    kl_penalised_advantages,
    prompt_baseline,
    token_rewards,
)

__all__ = [
    "adapted_beta",
    "clipped_policy_loss",
    "clipped_value_loss",
    "exact_token_kl",
    "explained_variance",
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
    "kl_penalised_advantages",
    "log_importance_ess",
    "log_z",
    "log_z_standard_error",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "prompt_baseline",
    "reverse_kl",
    "token_rewards",
    "tv",
]
