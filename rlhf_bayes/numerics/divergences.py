"""Divergences between two enumerated distributions, in nats (total variation: a probability)."""

import math

import torch
from torch import Tensor

from rlhf_bayes.numerics.kl import exact_token_kl


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """
    KL(p‖q): `Σ_i p_i (log p_i − log q_i)`; p is the target, q the approximation.

    Args:
        log_p (`torch.Tensor`): normalised log-probabilities (..., N), in nats; `-inf` is probability 0.
        log_q (`torch.Tensor`): normalised log-probabilities (..., N).

    Returns:
        `torch.Tensor`: (...), in nats; infinite where q misses part of p's support.

    Raises:
        ValueError: if the shapes differ, or a distribution does not sum to 1.
    """
    check_normalised(log_p, log_q)
    return exact_token_kl(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """
    KL(q‖p): `Σ_i q_i (log q_i − log p_i)`; p is the target, q the approximation. log Z − ELBO when p is the posterior.

    Args:
        log_p (`torch.Tensor`): normalised log-probabilities (..., N), in nats; `-inf` is probability 0.
        log_q (`torch.Tensor`): normalised log-probabilities (..., N).

    Returns:
        `torch.Tensor`: (...), in nats; infinite where p misses part of q's support.

    Raises:
        ValueError: if the shapes differ, or a distribution does not sum to 1.
    """
    return forward_kl(log_q, log_p)


def jeffreys(log_p: Tensor, log_q: Tensor) -> Tensor:
    """
    KL(p‖q) + KL(q‖p). Its estimate from samples of both needs no normaliser.

    Args:
        log_p (`torch.Tensor`): normalised log-probabilities (..., N), in nats; `-inf` is probability 0.
        log_q (`torch.Tensor`): normalised log-probabilities (..., N).

    Returns:
        `torch.Tensor`: (...), in nats.

    Raises:
        ValueError: if the shapes differ, or a distribution does not sum to 1.
    """
    return forward_kl(log_p, log_q) + reverse_kl(log_p, log_q)


def js(log_p: Tensor, log_q: Tensor) -> Tensor:
    """
    Jensen–Shannon divergence: `½ KL(p‖m) + ½ KL(q‖m)` with `m = ½ (p + q)`.

    Args:
        log_p (`torch.Tensor`): normalised log-probabilities (..., N), in nats; `-inf` is probability 0.
        log_q (`torch.Tensor`): normalised log-probabilities (..., N).

    Returns:
        `torch.Tensor`: (...), in nats, between 0 and log 2.

    Raises:
        ValueError: if the shapes differ, or a distribution does not sum to 1.
    """
    check_normalised(log_p, log_q)
    outside = (log_p == -torch.inf) & (log_q == -torch.inf)  # (..., N)
    # −inf is replaced before logaddexp, whose gradient is nan where both arguments are −inf
    log_m = torch.logaddexp(torch.where(outside, 0.0, log_p), torch.where(outside, 0.0, log_q)) - math.log(2)
    return 0.5 * (exact_token_kl(log_p, log_m) + exact_token_kl(log_q, log_m))


def tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """
    Total variation distance: `½ Σ_i |p_i − q_i|`.

    Args:
        log_p (`torch.Tensor`): normalised log-probabilities (..., N), in nats; `-inf` is probability 0.
        log_q (`torch.Tensor`): normalised log-probabilities (..., N).

    Returns:
        `torch.Tensor`: (...), between 0 and 1.

    Raises:
        ValueError: if the shapes differ, or a distribution does not sum to 1.
    """
    check_normalised(log_p, log_q)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def check_normalised(log_p: Tensor, log_q: Tensor) -> None:
    """Raise ValueError unless two tensors (..., N) are normalised log-probabilities of the same shape."""
    for name, log_prob in (("log_p", log_p), ("log_q", log_q)):
        log_mass = log_prob.detach().logsumexp(-1)  # (...)
        # written as "not small", so that nan is refused too
        if not bool((log_mass.abs() <= 1e-2).all()):
            worst = log_mass.flatten()[log_mass.abs().nan_to_num(torch.inf).argmax()]
            raise ValueError(
                f"`{name}` must be normalised over its last dimension, got log-mass {float(worst):.4g} in place of 0: "
                "pass log-probabilities, not log-densities (`log_density - log_density.logsumexp(-1, keepdim=True)`)."
            )
