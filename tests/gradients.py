"""Sampled gradients against exact ones. Not a test module."""

import math

import torch
from torch import Tensor


def assert_mean_gradient(samples: Tensor, expected: Tensor, limit: float = 5.0) -> None:
    """Samples (steps, D) have this mean (D,), within standard errors along a dozen directions."""
    directions = torch.randn(len(expected), 12, generator=torch.Generator().manual_seed(0)) / math.sqrt(len(expected))
    directions[:, :2] = 0.0
    largest = expected.abs().argsort(descending=True)
    for column, rank in enumerate((0, 40)):
        directions[largest[rank], column] = 1.0
    directions[:, 2] = expected / expected.norm()
    projected = samples @ directions  # (steps, 12)
    se = projected.std(0) / math.sqrt(len(projected))
    errors = (projected.mean(0) - expected @ directions) / se
    assert errors.abs().max() < limit, f"off by {errors.tolist()} standard errors"
    # and the test can tell: along the gradient itself it is many standard errors long
    assert (expected @ directions / se)[2] > 8
