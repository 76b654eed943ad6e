"""What a batch of on-policy completions says of the distance to the posterior."""

import torch
from torch import Tensor

from ..numerics import f_divergence_terms, grouped, importance_ess, khat, log_z


def posterior_metrics(
    rewards: Tensor,
    log_ratios: Tensor,
    kls: Tensor,
    beta: float,
    num_generations: int,
    log_zs: Tensor | None = None,
) -> dict[str, float]:
    r"""
    ELBO, log Z and their gap from completions drawn from the policy, in nats per sequence, averaged over prompts.

        log w = r/β − log(π/π0),   ELBO = E[log w],   log Ẑ = log mean_G w,   gap = log Ẑ − ELBO → KL(π‖π*)

    log Ẑ over the G completions of a prompt is low on average, and the gap cannot exceed log G: far from the posterior
    read it as a lower bound (Burda et al. 2016, arXiv 1509.00519, theorem 1). With G = 1 it would always be 0 and is
    left out. An estimate of log Z from elsewhere takes its place, if given. A policy that draws forbidden completions
    has no ELBO.

    Args:
        rewards (`Tensor` (B,)):
            r; nan where every reward function returned None, `-inf` where the completion is forbidden. Rows of a
            prompt are neighbours.
        log_ratios (`Tensor` (B,)):
            log(π/π0) of each completion.
        kls (`Tensor` (B,)):
            Estimate of KL(π‖π0) from each completion.
        beta (`float`):
            β of the posterior; with 0 there is none, and only the KL to the prior is given.
        num_generations (`int`):
            G, which divides B.
        log_zs (`Tensor` (B,), *optional*):
            log Z of each completion's prompt, nats; nan or `-inf` where it is not known.

    Returns:
        `dict[str, float]`: `posterior/kl_to_prior`, `posterior/elbo`, `posterior/log_z`, `posterior/gap` (nats) and
        `posterior/importance_ess` (completions out of G), as far as they are defined.
    """
    metrics = {"posterior/kl_to_prior": kls.mean().item()}
    log_weights = rewards / beta - log_ratios if beta > 0 else torch.full_like(rewards, torch.nan)  # (B,)
    scored = ~log_weights.isnan()
    if not scored.any():
        return metrics
    allowed = bool(log_weights[scored].isfinite().all())
    if allowed:
        metrics["posterior/elbo"] = log_weights[scored].mean().item()
    groups = log_weights.view(-1, num_generations)  # (B / G, G)
    whole = ~groups.isnan().any(-1)
    if num_generations > 1 and whole.any():
        metrics["posterior/importance_ess"] = importance_ess(groups[whole], dim=-1).mean().item()
    if log_zs is None and num_generations > 1:
        log_zs = log_z(groups, dim=-1)[:, None].expand_as(groups).flatten()  # (B,)
    known = scored & whole[:, None].expand_as(groups).flatten() if log_zs is None else scored & log_zs.isfinite()
    if log_zs is not None and known.any():
        metrics["posterior/log_z"] = log_zs[known].mean().item()
        if allowed:
            metrics["posterior/gap"] = (log_zs - log_weights)[known].mean().item()
    return metrics


def target_metrics(
    log_target: Tensor, log_policy: Tensor, log_proposal: Tensor, prompt_keys: Tensor
) -> dict[str, float]:
    r"""
    How far the policy is from the posterior by completions of whatever proposal, log Z being known.

        KL(p‖π) = E_q[π/q · g(p/π)],   g(t) = t·log t − t + 1,      TV = E_q[½·|p − π|/q]

    Args:
        log_target (`Tensor` (B,)):
            log p = log π0 + log_likelihood − log Z, nats; `-inf` where forbidden, nan for one to be left out.
        log_policy, log_proposal (`Tensor` (B,)):
            log π and log q, nats.
        prompt_keys (`Tensor` (B,)):
            Integers, equal for completions of a prompt.

    Returns:
        `dict[str, float]`: `posterior/forward_kl` (nats), `posterior/tv`, each with its standard error
        (`…_standard_error`, over prompts if there are several); `posterior/khat` and `posterior/max_weight`, the
        largest share, of the weights p/q. Empty where nothing is left.
    """
    kept = ~log_target.isnan()
    if not kept.any():
        return {}
    log_target, log_policy, log_proposal = (x[kept].double() for x in (log_target, log_policy, log_proposal))  # (n,)
    ratio = (log_policy - log_proposal).exp()
    layout = grouped(prompt_keys[kept])
    metrics = {}
    for name in ("forward_kl", "tv"):
        terms = ratio * f_divergence_terms(log_target - log_policy, name)  # (n,)
        means = layout.table(terms, torch.nan).nanmean(-1)  # (P,)
        spread = means if len(means) > 1 else terms
        metrics[f"posterior/{name}"] = means.mean().item()
        metrics[f"posterior/{name}_standard_error"] = (
            spread.std(unbiased=len(spread) > 1) / len(spread) ** 0.5
        ).item()
    log_weights = log_target - log_proposal
    if (log_weights > -torch.inf).any():
        metrics["posterior/max_weight"] = log_weights.softmax(0).max().item()
        metrics["posterior/khat"] = khat(log_weights).item()
    return {name: value for name, value in metrics.items() if value < torch.inf}


def satisfaction(log_likelihood: Tensor) -> float:
    """Share of completions that are not forbidden, of those with evidence (B,), nats, nan where there is none."""
    scored = (~log_likelihood.isnan()).sum().clamp(min=1)
    return 1.0 - ((log_likelihood == -torch.inf).sum() / scored).item()
