"""KL(p‖q): estimates from the log-probabilities of tokens drawn from p, and the value from whole distributions."""

import torch
from torch import Tensor


def k1(log_p: Tensor, log_q: Tensor) -> Tensor:
    """
    Unbiased estimate of KL(p‖q) for tokens drawn from p: `log p − log q`.

    It is the estimate to put into a reward: penalising it penalises KL(p‖q), and at the optimum of the KL-regularised
    objective the penalised return is the same for every completion.

    Args:
        log_p (`torch.Tensor`): log-probabilities under the distribution that was sampled, in nats, any shape.
        log_q (`torch.Tensor`): log-probabilities of the same tokens under the other distribution, same shape.

    Returns:
        `torch.Tensor`: estimate in nats, shape kept; may be negative.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return log_p - log_q


def k2(log_p: Tensor, log_q: Tensor) -> Tensor:
    """
    Biased, never negative estimate of KL(p‖q) for tokens drawn from p: `(log p − log q)² / 2`.

    Args:
        log_p (`torch.Tensor`): log-probabilities under the distribution that was sampled, in nats, any shape.
        log_q (`torch.Tensor`): log-probabilities of the same tokens under the other distribution, same shape.

    Returns:
        `torch.Tensor`: estimate in nats, shape kept.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return 0.5 * (log_p - log_q).square()


def k3(log_p: Tensor, log_q: Tensor) -> Tensor:
    """
    Unbiased, never negative estimate of KL(p‖q) for tokens drawn from p: `q/p − 1 − log(q/p)`.

    It is unbiased as a number to report. In a reward it moves the optimum, since it penalises KL(p‖q) − KL(q‖p).

    Args:
        log_p (`torch.Tensor`): log-probabilities under the distribution that was sampled, in nats, any shape.
        log_q (`torch.Tensor`): log-probabilities of the same tokens under the other distribution, same shape.

    Returns:
        `torch.Tensor`: estimate in nats, shape kept.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = log_q - log_p
    # expm1, since near the prior q/p − 1 would lose all its digits in fp32
    return torch.expm1(log_ratio) - log_ratio


def exact_token_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """
    KL(p‖q) of two distributions over the vocabulary: `Σ_v p_v (log p_v − log q_v)`, with `0 · log 0 = 0`.

    As an estimate of a sequence's KL it is unbiased and never has more variance than k1 (arXiv 2504.10637).

    Args:
        log_p (`torch.Tensor`): normalised log-probabilities (..., V), in nats; `-inf` is probability 0.
        log_q (`torch.Tensor`): normalised log-probabilities (..., V).

    Returns:
        `torch.Tensor`: KL(p‖q) in nats (...), infinite where q misses part of p's support.

    Raises:
        ValueError: if the shapes differ.
    """
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"`log_p` and `log_q` must have the same shape, got {tuple(log_p.shape)} and {tuple(log_q.shape)}."
        )
    in_support = log_p != -torch.inf  # (..., V)
    # both terms are replaced before they are subtracted: −inf − (−inf) would leave a nan in the gradient
    log_ratio = torch.where(in_support, log_p, 0.0) - torch.where(in_support, log_q, 0.0)
    # where p underflows, its term is 0 too, even if q = 0
    contribution = torch.where(log_p.exp() > 0, log_p.exp() * log_ratio, 0.0)
    return contribution.sum(-1)
