"""What a batch of on-policy completions says of the distance to the posterior."""

import torch
from torch import Tensor

from ..numerics import importance_ess, log_z


def posterior_metrics(
    rewards: Tensor, log_ratios: Tensor, kls: Tensor, beta: float, num_generations: int
) -> dict[str, float]:
    r"""
    ELBO, log Z and their gap from completions drawn from the policy, in nats per sequence, averaged over prompts.

        log w = r/β − log(π/π0),   ELBO = E[log w],   log Ẑ = log mean_G w,   gap = log Ẑ − ELBO → KL(π‖π*)

    log Ẑ over the G completions of a prompt is low on average, and the gap cannot exceed log G: far from the posterior
    read it as a lower bound (Burda et al. 2016, arXiv 1509.00519, theorem 1). With G = 1 it would always be 0 and is
    left out.

    Args:
        rewards (`Tensor` (B,)):
            r; nan where every reward function returned None. Rows of a prompt are neighbours.
        log_ratios (`Tensor` (B,)):
            log(π/π0) of each completion.
        kls (`Tensor` (B,)):
            Estimate of KL(π‖π0) from each completion.
        beta (`float`):
            β of the posterior; with 0 there is none, and only the KL to the prior is given.
        num_generations (`int`):
            G, which divides B.

    Returns:
        `dict[str, float]`: `posterior/kl_to_prior`, `posterior/elbo`, `posterior/log_z`, `posterior/gap` (nats) and
        `posterior/importance_ess` (completions out of G), as far as they are defined.
    """
    metrics = {"posterior/kl_to_prior": kls.mean().item()}
    log_weights = rewards / beta - log_ratios if beta > 0 else torch.full_like(rewards, torch.nan)  # (B,)
    scored = log_weights.isfinite()
    if not scored.any():
        return metrics
    metrics["posterior/elbo"] = log_weights[scored].mean().item()
    groups = log_weights.view(-1, num_generations)  # (B / G, G)
    groups = groups[groups.isfinite().all(-1)]
    if num_generations > 1 and len(groups) > 0:
        log_zs = log_z(groups, dim=-1)  # (prompts,)
        metrics["posterior/log_z"] = log_zs.mean().item()
        metrics["posterior/gap"] = (log_zs - groups.mean(-1)).mean().item()
        metrics["posterior/importance_ess"] = importance_ess(groups, dim=-1).mean().item()
    return metrics
