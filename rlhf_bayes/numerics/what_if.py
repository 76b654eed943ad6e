"""Estimates of the posteriors of many β from the same draws, of the prior or another, to choose β before training."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_bayes.numerics.log_weights import (
    importance_ess,
    log_z,
    log_z_standard_error,
    pooled_khat,
    weights_suffice,
)

_ONE_SIDED = 1.645  # the 95% quantile of the normal distribution


class WhatIf(NamedTuple):
    """The posterior π0·exp(r/β)/Z at one β: means over prompts; standard errors are those of the draws alone."""

    beta: float
    reward: float
    """E_π*[r]."""
    reward_standard_error: float
    kl_to_prior: float
    """KL(π*‖π0), nats."""
    kl_to_prior_standard_error: float
    log_z: float
    """log Z, in nats: the upper bound of the ELBO."""
    log_z_standard_error: float
    importance_ess: float
    """Effective sample size of the weights, for the prompt with the smallest."""
    khat: float
    """Pareto shape k̂ of the weights of all prompts together; infinite where it cannot be fitted."""
    trustworthy: bool
    """Whether these figures can be trusted: for all prompts the ESS is large enough, and k̂ is small enough."""
    reward_at_least: float
    """Lower bound of E_π*[r] at 95% confidence, which holds where the estimate cannot be trusted too."""
    kl_to_prior_at_least: float
    """Lower bound of KL(π*‖π0), nats, of the same kind."""
    log_z_at_least: float
    """Lower bound of log Z, nats, of the same kind."""


def what_if(rewards: Tensor, betas: Sequence[float], log_ratios: Tensor | None = None) -> list[WhatIf]:
    r"""
    Estimates of the posterior at each β, by reweighting draws of the prior, or of another proposal q.

        w_i = π0/q·exp(r_i/β),    w̄ = w/Σw,    E_π*[r] ≈ Σ_i w̄_i·r_i
        KL(π*‖π0) ≈ E_π*[r]/β − log Ẑ,    Ẑ = (1/n) Σ_i w_i

    The smaller β is, the fewer draws have weight: about exp(KL(π*‖π0)) draws are needed. All β use the same draws, so
    the errors of neighbouring rows are correlated.

    Where they do not suffice there are bounds: E[log Ẑ] ≤ log Z by Jensen's inequality, E_π*[r] ≥ β·log Z, and E_π*[r]
    and KL(π*‖π0) are at least those of any larger β.

    Args:
        rewards (`torch.Tensor`):
            (P, n): rewards of n completions of each of P prompts, drawn from the prior; `-inf` where one is forbidden.
        betas (`Sequence[float]`):
            Values of β, units of reward per nat of evidence, positive.
        log_ratios (`torch.Tensor`, *optional*):
            (P, n), nats: log π0 − log q of completions that q drew. Default: 0, draws of the prior.

    Returns:
        `list[WhatIf]`: one for each β, in the given order.

    Raises:
        ValueError: if the shape is wrong, a reward is nan or `+inf`, or a β is not positive and finite.

    Source: Owen 2013, "Monte Carlo theory, methods and examples", equations 9.8 and 9.9; standard errors by the delta
    method.
    """
    if rewards.dim() != 2 or rewards.size(1) < 2:
        raise ValueError(
            f"`rewards` must be (prompts, draws) with at least 2 draws a prompt, got {tuple(rewards.shape)}: one has "
            "no spread."
        )
    rewards = rewards.detach().double().cpu()
    ratios = torch.zeros_like(rewards) if log_ratios is None else log_ratios.detach().double().cpu()
    if ratios.shape != rewards.shape or not bool(ratios.isfinite().all()):
        raise ValueError(
            f"`log_ratios` must be finite and of the shape of `rewards`, {tuple(rewards.shape)}, got "
            f"{tuple(ratios.shape)} or a number that is not. Leave it out for draws of the prior."
        )
    if bool((rewards.isnan() | (rewards == math.inf)).any()):
        raise ValueError("`rewards` must be finite or -inf, got nan or +inf. Look for the completion that has it.")
    for beta in betas:
        if not 0 < beta < math.inf:
            raise ValueError(f"`betas` must be positive and finite, got {beta}: β = 0 has no posterior.")
    found = {beta: _at(rewards, ratios, beta) for beta in sorted({float(beta) for beta in betas}, reverse=True)}
    above_reward, above_kl = -math.inf, 0.0
    for beta, row in found.items():  # from the largest β on
        above_reward = max(above_reward, row.reward_at_least)
        above_kl = max(above_kl, row.kl_to_prior_at_least)
        found[beta] = row._replace(reward_at_least=above_reward, kl_to_prior_at_least=above_kl)
    return [found[float(beta)] for beta in betas]


def _at(rewards: Tensor, log_ratios: Tensor, beta: float) -> WhatIf:
    log_weights = rewards / beta + log_ratios  # (P, n)
    num_prompts, n = rewards.shape
    sizes, shape = importance_ess(log_weights), pooled_khat(log_weights)
    trusted = weights_suffice(sizes, shape, n)
    normaliser = log_z(log_weights)  # (P,)
    weights = torch.where(log_weights > -math.inf, (log_weights - math.log(n) - normaliser[:, None]).exp(), 0.0)
    possible = torch.where(weights > 0, rewards, 0.0)  # -inf times 0 is nan
    mean = (weights * possible).sum(-1, keepdim=True)  # (P, 1)
    # the influence of each draw on the estimates, to first order
    of_reward = weights * (possible - mean)  # (P, n)
    of_kl = of_reward / beta - (weights - 1 / n)
    reward, log_z_mean = mean.mean().item(), normaliser.mean().item()
    kl = (mean.squeeze(-1) / beta - normaliser).mean().item()
    reward_error, kl_error = _error_of_mean(of_reward), _error_of_mean(of_kl)
    log_z_error = log_z_standard_error(log_weights).square().sum().sqrt().item() / num_prompts
    log_z_at_least = log_z_mean - _ONE_SIDED * log_z_error
    return WhatIf(
        beta=beta,
        reward=reward,
        reward_standard_error=reward_error,
        kl_to_prior=kl,
        kl_to_prior_standard_error=kl_error,
        log_z=log_z_mean,
        log_z_standard_error=log_z_error,
        importance_ess=sizes.min().item(),
        khat=shape,
        trustworthy=trusted,
        reward_at_least=reward - _ONE_SIDED * reward_error if trusted else beta * log_z_at_least,
        kl_to_prior_at_least=max(kl - _ONE_SIDED * kl_error, 0.0) if trusted else 0.0,
        log_z_at_least=log_z_at_least,
    )


def _error_of_mean(influences: Tensor) -> float:  # (P, n)
    return influences.square().sum().sqrt().item() / influences.size(0)
