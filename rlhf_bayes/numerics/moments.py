"""The exponential family with given moments: the convex dual, solved on weighted draws."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_bayes.numerics.log_weights import importance_ess, khat, log_z
from rlhf_bayes.numerics.moment_support import check_each_supported, check_together_supported

MAX_ITERATIONS = 200
CONVERGED = 1e-9  # standard deviations of a feature
DIVERGED = 1e4  # nats per standard deviation
SMALLEST_VARIANCE = 1e-6  # of a combination of features, in units of their variance on the draws


class MomentFit(NamedTuple):
    """
    λ of an exponential family, and estimates from P groups of draws with F features, fp64 on the CPU.

    Standard errors are those of the draws for these groups; another set of prompts may differ by more.
    """

    lambdas: Tensor
    """(F,) nats per unit of each feature."""
    standard_errors: Tensor
    """(F,): standard errors of `lambdas`, from H⁻¹ V H⁻¹ with H the dual's Hessian and V its gradient's variance."""
    moments: Tensor
    """(F,): moments reached on these draws, which are the given ones up to rounding."""
    moment_standard_errors: Tensor
    """(F,) √V: how far the moments of exp(λ·φ) on other draws typically are from the given ones."""
    prior_moments: Tensor
    """(F,): moments at λ = 0."""
    log_z: Tensor
    """(P,) nats: log E_π0[exp(λ·φ)] of each group."""
    mean_log_z: float
    """Mean of `log_z` over the groups, nats."""
    log_z_standard_error: float
    """Standard error of `mean_log_z`, which includes the error of λ."""
    kl: float
    """KL(π*‖π0) = λ·μ̄ − log Z, nats, the mean over the groups."""
    kl_standard_error: float
    """Standard error of `kl`. The error of λ does not matter to first order, since λ minimises the dual."""
    importance_ess: Tensor
    """(P,): effective sample size of the weights, at λ."""
    khat: Tensor
    """(P,): Pareto shape of the weights, at λ."""


def fit_moments(
    features: Tensor, moments: Tensor, log_weights: Tensor | None = None, names: Sequence[str] | None = None
) -> MomentFit:
    r"""
    The exponential family that is closest in KL to π0 among all distributions with the given moments:

        π*(x)  =  π0(x) · exp(λ·φ(x)) / Z(λ),        λ  =  argmin  log Z(λ) − λ·μ̄

    The dual is convex, with the gradient E_π*[φ] − μ̄ and the Hessian Cov_π*[φ]; damped Newton steps start from λ = 0.
    P groups (prompts) share one λ, but each has its own Z. The moments are those of the mixture of the groups, the
    dual is the mean over groups, and the mean of their KLs is minimised.

    Expectations are self-normalised over the n draws of each group, so they have a bias of the order of 1/n. More
    groups do not reduce it.

    Args:
        features (`torch.Tensor`):
            φ of each draw, (N, F), or (P, n, F) for P groups of n; F may be 0.
        moments (`torch.Tensor`):
            μ̄, (F,), in the features' units.
        log_weights (`torch.Tensor`, *optional*):
            log π0(x) − log q(x) of draws from a proposal q, nats: (N,) or (P, n). `-inf` where π0 is 0. Default: 0,
            for draws from π0.
        names (`Sequence[str]`, *optional*):
            Names of the features, for error messages. Default: their indices.

    Returns:
        [`MomentFit`]

    Raises:
        `ValueError`: if shapes do not fit, numbers are not finite, a group has no weight, a moment is outside of the
            range of the draws or at its end, moments contradict each other, or one feature follows from the others.

    Source: Khalifa, Elsahar & Dymetman 2021, arXiv 2012.11635, section 2.1 (one group, and gradient steps on the
    squared error of the moments). The projection: Csiszár 1975. The sandwich: Huber 1967.
    """
    features, moments, log_weights, names = _checked(features, moments, log_weights, names)
    live = log_weights > -torch.inf  # (P, n)
    check_each_supported(features, live, moments, names)
    center, scale = _within(features, live)
    scaled = torch.where(live[..., None], (features - center) / scale, 0.0)  # (P, n, F)
    scaled_lambdas, error, curvature = _newton(scaled, (moments - center.mean((0, 1))) / scale, log_weights)
    # For moments at the end of their range, Newton's steps come arbitrarily close while the variance in one direction
    # vanishes. So moments that are reached with variance in every direction are inside; otherwise a linear program
    # decides, at a higher cost.
    if error > CONVERGED or curvature < SMALLEST_VARIANCE:
        check_together_supported(features, live, moments, names)
    if error > CONVERGED:
        raise ValueError(
            f"`moments` must be well inside of what the draws reach; after {MAX_ITERATIONS} Newton steps they are "
            f"still {error:.2g} standard deviations away. Draw more, or ask for less extreme moments."
        )
    return _fit(features, moments, log_weights, scaled_lambdas / scale)


def _newton(features: Tensor, moments: Tensor, log_weights: Tensor) -> tuple[Tensor, float, float]:
    """
    λ (F,) at the minimum of the dual, for features of unit variance.

    Returned with the size of the remaining gradient and the least variance of the features in any direction.
    """
    lambdas = best = torch.zeros_like(moments)
    best_error, best_curvature = math.inf, 0.0
    if moments.numel() == 0:
        return lambdas, 0.0, math.inf
    for _ in range(MAX_ITERATIONS):
        dual, gradient, hessian = _dual(features, moments, log_weights, lambdas)
        error = float(gradient.abs().max())
        if error < best_error:
            best, best_error, best_curvature = lambdas, error, float(torch.linalg.eigvalsh(hessian)[0])
        if error < 1e-12 or float(lambdas.abs().max()) > DIVERGED:
            break
        # where one draw has all the weight the Hessian is singular, so a small ridge is added
        ridge = 1e-12 * torch.eye(len(lambdas), dtype=torch.float64)
        step = -torch.linalg.solve(hessian + ridge, gradient)
        slope, size = float(gradient @ step), 1.0
        if slope > -1e-13:
            # a gain smaller than the rounding of the dual cannot be measured; full steps converge from here
            if error >= best_error and best is not lambdas:
                break
        else:
            while (
                size > 1e-12
                and _value(features, moments, log_weights, lambdas + size * step) > dual + 1e-4 * size * slope
            ):
                size /= 2
        lambdas = lambdas + size * step
    return best, best_error, best_curvature


def _value(features: Tensor, moments: Tensor, log_weights: Tensor, lambdas: Tensor) -> float:
    return float(log_z(log_weights + features @ lambdas).mean() - lambdas @ moments)


def _dual(features: Tensor, moments: Tensor, log_weights: Tensor, lambdas: Tensor) -> tuple[float, Tensor, Tensor]:
    """Value, gradient (F,) and Hessian (F, F) of mean_c log Z_c(λ) − λ·μ̄."""
    log_tilted = log_weights + features @ lambdas  # (P, n)
    weights = log_tilted.softmax(-1)[..., None]  # (P, n, 1)
    means = (weights * features).sum(1, keepdim=True)  # (P, 1, F)
    centered = features - means
    hessian = (weights * centered).flatten(0, 1).T @ centered.flatten(0, 1) / len(features)
    value = float(log_z(log_tilted).mean() - lambdas @ moments)
    return value, means.mean((0, 1)) - moments, hessian


def _fit(features: Tensor, moments: Tensor, log_weights: Tensor, lambdas: Tensor) -> MomentFit:
    num_groups, n, _ = features.shape
    # rows without weight may hold any finite number
    log_tilted = log_weights + features @ lambdas  # (P, n)
    weights = log_tilted.softmax(-1)  # (P, n)
    means = (weights[..., None] * features).sum(1, keepdim=True)  # (P, 1, F)
    scores = weights[..., None] * (features - means) / num_groups  # (P, n, F): each draw's share in the gradient
    _, _, hessian = _dual(features, moments, log_weights, lambdas)
    small_sample = n / (n - 1) if n > 1 else torch.inf
    variance = small_sample * scores.flatten(0, 1).T @ scores.flatten(0, 1)  # (F, F)
    inverse = torch.linalg.inv(hessian)
    # each draw's share in mean log Z: through the weights at a given λ, and through λ
    at_lambda = (weights - 1 / n) / num_groups  # (P, n)
    through_lambda = -scores @ (inverse @ moments)
    normalisers = log_z(log_tilted)  # (P,)
    return MomentFit(
        lambdas=lambdas,
        standard_errors=(inverse @ variance @ inverse).diagonal().clamp(min=0).sqrt(),
        moments=means.mean((0, 1)),
        moment_standard_errors=variance.diagonal().sqrt(),
        prior_moments=(log_weights.softmax(-1)[..., None] * features).sum(1).mean(0),
        log_z=normalisers,
        mean_log_z=float(normalisers.mean()),
        log_z_standard_error=float((small_sample * (at_lambda + through_lambda).square().sum()).sqrt()),
        kl=float(lambdas @ moments - normalisers.mean()),
        kl_standard_error=float((small_sample * at_lambda.square().sum()).sqrt()),
        importance_ess=importance_ess(log_tilted),
        khat=torch.stack([khat(row) for row in log_tilted]),
    )


def _within(features: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (P, 1, F) and pooled standard deviation (F,) within groups, of the draws that count."""
    counts = live.sum(1).clamp(min=1)[:, None, None]  # (P, 1, 1)
    kept = torch.where(live[..., None], features, 0.0)
    center = kept.sum(1, keepdim=True) / counts
    squares = torch.where(live[..., None], (features - center).square(), 0.0)
    return center, (squares.sum(1, keepdim=True) / counts).mean((0, 1)).sqrt()


def _checked(
    features: Tensor, moments: Tensor, log_weights: Tensor | None, names: Sequence[str] | None
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    if features.dim() not in (2, 3) or 0 in features.shape[:-1]:
        raise ValueError(
            f"`features` must be (N, F), or (P, n, F) for P groups of n draws, got {tuple(features.shape)}. Stack the "
            "features of a draw along the last dimension."
        )
    if log_weights is None:
        log_weights = features.new_zeros(features.shape[:-1], dtype=torch.float64)
    if moments.shape != features.shape[-1:] or log_weights.shape != features.shape[:-1]:
        raise ValueError(
            f"`moments` must be (F,) and `log_weights` one for each draw, got {tuple(moments.shape)} and "
            f"{tuple(log_weights.shape)} with `features` {tuple(features.shape)}."
        )
    named = [str(index) for index in range(features.size(-1))] if names is None else list(names)
    if len(named) != features.size(-1):
        raise ValueError(f"`names` must name the {features.size(-1)} features, got {named}.")
    grouped = features.dim() == 3
    groups = features.detach().double().cpu()[None if not grouped else ...]  # (P, n, F)
    weights = log_weights.detach().double().cpu()[None if not grouped else ...]  # (P, n)
    for name, values in (("features", groups), ("moments", moments)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"`{name}` must be finite, got nan or an infinity. Look at what the feature returns.")
    if bool((weights.isnan() | (weights == torch.inf)).any()):
        raise ValueError(
            "`log_weights` must be finite or -inf, got nan or +inf: a draw has a positive proposal probability."
        )
    empty = (weights == -torch.inf).all(-1).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Each group must have a draw of positive weight, group {empty[0]} has none among {weights.size(1)} (and "
            f"{len(empty)} of {len(weights)} groups in all). Draw more, or from a proposal that meets the constraint."
        )
    return groups, moments.detach().double().cpu(), weights, named
