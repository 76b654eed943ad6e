"""Calibration of predicted probabilities: reliability bins, calibration error, Brier score."""

from typing import NamedTuple

import torch
from torch import Tensor


class ReliabilityBins(NamedTuple):
    """Predictions sorted into bins of equal width over confidence in [1/2, 1]; each (num_bins,), fp64, on the CPU."""

    confidence: Tensor
    """Mean confidence; nan where the bin is empty."""
    accuracy: Tensor
    """Share of the votes on the predicted side; nan where the bin is empty."""
    weight: Tensor
    """Share of the pairs in the bin."""


def reliability_bins(prob: Tensor, target: Tensor, num_bins: int = 10) -> ReliabilityBins:
    """
    How often predictions of a given confidence come true.

    Confidence is `max(prob, 1 − prob)`, accuracy the target of the predicted side (1/2 where prob is 1/2). So it does
    not matter which of the two texts is called `chosen`.

    Args:
        prob (`torch.Tensor`): predicted P(chosen ≻ rejected), (N,).
        target (`torch.Tensor`): `chosen_prob` (N,), 0 or 1 for a single vote.
        num_bins (`int`, defaults to `10`): bins over [1/2, 1].

    Returns:
        [`ReliabilityBins`]

    Raises:
        ValueError: if there are no pairs, the shapes differ, values are outside [0, 1], or `num_bins` is below 1.

    Source: Guo et al. 2017, arXiv 1706.04599, section 2.
    """
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, got {num_bins}: 10 is usual.")
    prob, target = _checked_pairs(prob, target)
    confidence = torch.maximum(prob, 1 - prob)  # (N,)
    accuracy = torch.where(prob > 0.5, target, 1 - target)  # (N,)
    accuracy = torch.where(prob == 0.5, 0.5, accuracy)
    index = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)  # (N,)
    counts = torch.bincount(index, minlength=num_bins).double()  # (num_bins,)
    # 0/0 = nan marks the empty bins
    return ReliabilityBins(
        confidence=torch.bincount(index, confidence, minlength=num_bins) / counts,
        accuracy=torch.bincount(index, accuracy, minlength=num_bins) / counts,
        weight=counts / len(prob),
    )


def expected_calibration_error(prob: Tensor, target: Tensor, num_bins: int = 10) -> float:
    """
    Mean distance of confidence and accuracy: `Σ_b weight_b |accuracy_b − confidence_b|` over [`reliability_bins`].

    On a finite sample it is positive even for a perfect model, so compare models on the same pairs.

    Args:
        prob (`torch.Tensor`): predicted P(chosen ≻ rejected), (N,).
        target (`torch.Tensor`): `chosen_prob` (N,).
        num_bins (`int`, defaults to `10`): bins over [1/2, 1].

    Returns:
        `float`: between 0 and 1.

    Raises:
        ValueError: as [`reliability_bins`].

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    bins = reliability_bins(prob, target, num_bins)
    return float((bins.weight * (bins.accuracy - bins.confidence).abs().nan_to_num(0.0)).sum())


def brier_score(prob: Tensor, target: Tensor) -> float:
    """
    Mean squared error of the probability: `mean (prob − target)²`.

    With shares of votes as targets it is lower than with single votes by the mean of p(1 − p), for every model alike.

    Args:
        prob (`torch.Tensor`): predicted P(chosen ≻ rejected), (N,).
        target (`torch.Tensor`): `chosen_prob` (N,).

    Returns:
        `float`: between 0 and 1.

    Raises:
        ValueError: if there are no pairs, the shapes differ, or values are outside [0, 1].

    Source: Brier 1950, for one of two classes.
    """
    prob, target = _checked_pairs(prob, target)
    return float((prob - target).square().mean())


def checked_probability(name: str, probability: Tensor, like: Tensor | None = None) -> Tensor:
    """fp32 or better, in [0, 1], of a shape that broadcasts to that of `like` and no further."""
    if like is not None:
        try:
            fits = torch.broadcast_shapes(probability.shape, like.shape) == like.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"`{name}` must have a shape that broadcasts to {tuple(like.shape)}, got {tuple(probability.shape)}: "
                "one value a pair."
            )
    probability = fp32(probability)
    # written as "not inside", so that nan is refused too
    wrong = ~((probability >= 0) & (probability <= 1))
    if wrong.any():
        value = probability.detach()[wrong][0].item()
        raise ValueError(
            f"`{name}` must be in [0, 1], got {value:.6g}: pass a share or a probability, not a percentage, a count "
            "or a score."
        )
    return probability


def fp32(x: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def _checked_pairs(prob: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prob.dim() != 1 or prob.numel() == 0 or prob.shape != target.shape:
        raise ValueError(
            f"`prob` and `target` must both be (N,) with N > 0, got {tuple(prob.shape)} and {tuple(target.shape)}: "
            "one value a pair."
        )
    return (
        checked_probability("prob", prob).detach().double().cpu(),
        checked_probability("target", target).detach().double().cpu(),
    )
