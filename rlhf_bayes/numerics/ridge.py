"""Ridge regression from sums over data, for many penalties at once."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RegressionSums:
    """
    All that a linear regression needs to know of its data, as sums that can be added over batches and processes.

    The first entry of each row of features is the constant 1.
    """

    gram: Tensor
    """(1 + F, 1 + F) fp64: Σ_n w_n x_n x_nᵀ. Its first entry is the total weight."""
    cross: Tensor
    """(1 + F,) fp64: Σ_n w_n x_n y_n."""

    @classmethod
    def of(cls, features: Tensor, targets: Tensor, weights: Tensor) -> "RegressionSums":
        """
        Sums over N rows.

        Args:
            features (`torch.Tensor`): x, without the constant (N, F).
            targets (`torch.Tensor`): y (N,).
            weights (`torch.Tensor`): w (N,), at least 0.
        """
        # fp64, since the variance of a feature is a small difference of sums where its mean is large
        rows = with_constant(features.double())
        weighted = rows * weights.double()[:, None]  # (N, 1 + F)
        return cls(weighted.T @ rows, weighted.T @ targets.double())

    def plus(self, other: "RegressionSums", decay: float = 1.0) -> "RegressionSums":
        """`decay` times these sums, plus others."""
        return RegressionSums(decay * self.gram + other.gram, decay * self.cross + other.cross)


def with_constant(features: Tensor) -> Tensor:
    """(…, F) -> (…, 1 + F): a 1 in front."""
    return torch.cat([torch.ones_like(features[..., :1]), features], dim=-1)


def ridge_fits(sums: RegressionSums, penalties: Tensor) -> Tensor:
    r"""
    Coefficients of ridge regressions with several penalties, from one eigendecomposition.

        argmin over b, a of   Σ_n w_n (y_n − b − aᵀ z_n)² / Σ_n w_n  +  penalty · |a|²

    z are the features with mean 0 and variance 1; the constant b is not penalised. A penalty is thus a number without
    units: a feature that is independent of the others is shrunk by the factor 1/(1 + penalty).

    Args:
        sums ([`RegressionSums`]): the data.
        penalties (`torch.Tensor`): K positive numbers, `inf` among them if wished: that fit is the mean of y (K,).

    Returns:
        `torch.Tensor`: coefficients (K, 1 + F) fp64, for features as they came, with the constant first.

    Source: Hoerl & Kennard 1970, Ridge regression.
    """
    total = sums.gram[0, 0]
    mean, mean_target = sums.gram[0, 1:] / total, sums.cross[0] / total  # (F,), ()
    covariance = sums.gram[1:, 1:] / total - mean[:, None] * mean  # (F, F)
    with_target = sums.cross[1:] / total - mean * mean_target  # (F,)
    variance = covariance.diagonal().clamp(min=0.0)  # (F,)
    # a feature that does not vary, but for rounding, explains nothing
    varies = variance > 1e-10 * (mean.square() + 1e-10)
    scale = torch.where(varies, variance.sqrt(), torch.inf)  # (F,)
    values, vectors = torch.linalg.eigh(covariance / scale[:, None] / scale)
    shrunk = 1 / (values.clamp(min=0.0) + penalties.to(values)[:, None])  # (K, F)
    slopes = (shrunk * (vectors.T @ (with_target / scale))) @ vectors.T / scale  # (K, F)
    return torch.cat([(mean_target - slopes @ mean)[:, None], slopes], dim=1)
