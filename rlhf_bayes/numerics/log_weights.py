"""Estimates from importance log-weights: log Z, its standard error, the effective sample size, the Pareto shape.

A log-weight is `log P(x) − log q(x)` in nats, with x drawn from q and P unnormalised. It is `-inf` for a forbidden
completion.
"""

import math

import torch
from torch import Tensor

MIN_IMPORTANCE_ESS = 10.0
"""Below this, an estimate rests on so few draws that neither it nor its standard error can be trusted."""
MIN_DRAWS = 25
"""With fewer draws of a prompt, nothing that rests on their weights is trusted."""


def log_z(log_weights: Tensor, dim: int = -1) -> Tensor:
    """
    Importance-sampling estimate of the log-normaliser: `log (1/n) Σ_i w_i`.

    The mean of the weights is unbiased for Z; its logarithm is too low by about SE²/2 on average.

    Args:
        log_weights (`torch.Tensor`): log-weights in nats; n along `dim`.
        dim (`int`, defaults to `-1`): the dimension of the draws.

    Returns:
        `torch.Tensor`: log Z in nats, `dim` removed; `-inf` where every weight is 0.

    Raises:
        ValueError: if there are no draws.
    """
    return _fp32(log_weights, dim).logsumexp(dim) - math.log(log_weights.size(dim))


def weighted_mean(values: Tensor, log_weights: Tensor) -> Tensor:
    """
    Self-normalised mean over the last dimension: `Σ w·f / Σ w`.

    Args:
        values (`torch.Tensor`): f (..., N); may be −inf.
        log_weights (`torch.Tensor`): log w (..., N), nats, up to a constant.

    Returns:
        `torch.Tensor`: (...).

    Source: Owen 2013, "Monte Carlo theory, methods and examples", equation 9.6.
    """
    shares = log_weights.softmax(-1)
    return torch.where(shares > 0, shares * values, 0.0).sum(-1)


def log_z_standard_error(log_weights: Tensor, dim: int = -1) -> Tensor:
    """
    Standard error of `log_z` by the delta method: `√(1/ESS − 1/n)`.

    It can be trusted only where `khat` is below 0.5: otherwise the weights have no finite variance.

    Args:
        log_weights (`torch.Tensor`): log-weights in nats; n along `dim`.
        dim (`int`, defaults to `-1`): the dimension of the draws.

    Returns:
        `torch.Tensor`: standard error in nats, `dim` removed; infinite for one draw, or where every weight is 0.

    Raises:
        ValueError: if there are no draws.
    """
    n = log_weights.size(dim)
    log_ess = log_importance_ess(log_weights, dim)
    if n == 1:
        # for one draw the formula would give 0
        return torch.full_like(log_ess, torch.inf)
    # with equal weights, rounding may make the ESS larger than n
    return (torch.exp(-log_ess) - 1 / n).clamp(min=0).sqrt()


def log_importance_ess(log_weights: Tensor, dim: int = -1) -> Tensor:
    """
    Logarithm of the effective sample size of the weights: `log (Σ_i w_i)² / Σ_i w_i²`.

    Args:
        log_weights (`torch.Tensor`): log-weights in nats, n along `dim`; a common constant does not matter.
        dim (`int`, defaults to `-1`): the dimension of the draws.

    Returns:
        `torch.Tensor`: between 0 and log n, `dim` removed; `-inf` where every weight is 0.

    Raises:
        ValueError: if there are no draws.

    Source: Kong 1992; Owen 2013, "Monte Carlo theory, methods and examples", equation 9.13.
    """
    log_weights = _fp32(log_weights, dim)
    log_sum = log_weights.logsumexp(dim)
    log_ess = 2 * log_sum - (2 * log_weights).logsumexp(dim)
    return torch.where(log_sum == -torch.inf, -torch.inf, log_ess)


def importance_ess(log_weights: Tensor, dim: int = -1) -> Tensor:
    """
    Effective sample size of the weights: `(Σ_i w_i)² / Σ_i w_i²`.

    For correlated states of a chain see [`~rlhf_bayes.numerics.mcmc.effective_sample_size`].

    Args:
        log_weights (`torch.Tensor`): log-weights in nats, n along `dim`; a common constant does not matter.
        dim (`int`, defaults to `-1`): the dimension of the draws.

    Returns:
        `torch.Tensor`: between 1 and n draws, `dim` removed; 0 where every weight is 0.

    Raises:
        ValueError: if there are no draws.
    """
    return log_importance_ess(log_weights, dim).exp()


def khat(log_weights: Tensor) -> Tensor:
    """
    Shape of the generalised Pareto distribution fitted to the largest weights (PSIS k̂).

    Below 0.5 the weights have a finite variance; above `khat_threshold(n)` their estimates cannot be trusted.

    Args:
        log_weights (`torch.Tensor`): log-weights (n,) in nats; a common constant does not matter, `-inf` is weight 0.

    Returns:
        `torch.Tensor`: k̂, fp64 scalar on the CPU. It is `inf` where the tail has fewer than 5 weights (always for
            n < 25), too few to fit, or where every weight is 0. It is `-inf` where all weights of the tail are equal
            (a point mass, the limit of bounded tails).

    Raises:
        ValueError: if `log_weights` is not (n,), is empty, or holds nan or `+inf`.

    Source: Vehtari et al. 2024, JMLR 25(72), arXiv 1507.02646; tail of min(n/5, 3√n) draws.
    """
    if log_weights.dim() != 1 or log_weights.numel() == 0:
        raise ValueError(
            f"`log_weights` must be (n,) with n > 0, got {tuple(log_weights.shape)}: call it once per prompt."
        )
    log_weights = log_weights.detach().double().cpu()
    if bool((log_weights.isnan() | (log_weights == torch.inf)).any()):
        raise ValueError(
            "`log_weights` must be finite or -inf, got nan or +inf: a drawn completion has a positive proposal "
            "probability. Look for a reward that is nan or +inf."
        )
    log_weights = log_weights.sort().values  # (n,)
    n, largest = log_weights.numel(), log_weights[-1]
    tail_size = int(min(n / 5, 3 * math.sqrt(n)))
    if tail_size < 5 or largest == -torch.inf:
        return log_weights.new_tensor(torch.inf)
    cutoff = log_weights[-tail_size - 1]
    tail = log_weights[log_weights > cutoff]  # (m,)
    if tail.numel() == 0:
        return log_weights.new_tensor(-torch.inf)
    if tail.numel() < 5:
        return log_weights.new_tensor(torch.inf)
    # w − cutoff up to a scale, which the shape does not depend on; expm1 is accurate for nearly equal weights
    excesses = torch.exp(tail - largest) * -torch.expm1(cutoff - tail)  # (m,), ascending
    return _generalised_pareto_shape(excesses)


def khat_threshold(n: int) -> float:
    """
    The k̂ above which `n` draws do not suffice: `min(1 − 1/log₁₀ n, 0.7)`.

    Args:
        n (`int`): number of draws, above 1.

    Returns:
        `float`: the threshold; negative below 10 draws.

    Raises:
        ValueError: if `n` is below 2.

    Source: Vehtari et al. 2024, JMLR 25(72), arXiv 1507.02646.
    """
    if n < 2:
        raise ValueError(f"`n` must be at least 2, got {n}: one draw has no tail.")
    return min(1 - 1 / math.log10(n), 0.7)


def pooled_khat(log_weights: Tensor) -> float:
    """
    k̂ of the weights of all prompts together, each divided by its prompt's Z.

    To first order, the mean of log Z over prompts is the mean of these weights. With a k̂ for each of 16 prompts, some
    would exceed the threshold by chance, even if no weight has a heavy tail.

    Args:
        log_weights (`torch.Tensor`): log-weights (P, N) in nats; `-inf` is weight 0.

    Returns:
        `float`: k̂; infinite where too few weights are distinct to fit it.
    """
    relative = log_weights - log_weights.logsumexp(-1, keepdim=True)  # nan where every weight is 0
    relative = relative.nan_to_num(nan=-torch.inf, neginf=-torch.inf).flatten()
    return math.inf if _ties(relative) else float(khat(relative))


def weights_suffice(importance_ess: Tensor, khat: float, num_draws: int) -> bool:
    """
    Whether a mean over prompts of estimates from weights can be trusted.

    Each prompt must have 25 draws with an effective sample size of 10, and k̂ must be below its threshold. Where k̂ is
    infinite, too many weights are equal to fit the tail, and only the sample sizes decide.

    Args:
        importance_ess (`torch.Tensor`): (P,), effective sample size of the weights of each prompt.
        khat (`float`): from [`pooled_khat`].
        num_draws (`int`): draws of each prompt.
    """
    enough = num_draws >= MIN_DRAWS and bool((importance_ess >= MIN_IMPORTANCE_ESS).all())
    return enough and (khat < khat_threshold(num_draws * len(importance_ess)) or khat == math.inf)


def _ties(log_weights: Tensor) -> bool:
    """Whether the largest weights (N,) have few distinct values, as with short completions or a discrete reward."""
    # the shape of a Pareto distribution fitted to tied weights depends only on the gaps between them
    tail = log_weights.topk(min(len(log_weights), math.ceil(3 * math.sqrt(len(log_weights))))).values
    return len(tail.mul(1e4).round().unique()) < len(tail) / 2


def _generalised_pareto_shape(excesses: Tensor) -> Tensor:
    """
    Posterior mean of the shape, from ascending excesses (m,) over a threshold.

    Source: Zhang & Stephens 2009, Technometrics 51(3); weak prior of Vehtari et al. 2024: ten more draws of shape
    0.5.
    """
    m = excesses.numel()
    n_grid = 30 + int(math.sqrt(m))
    first_quartile = excesses[int(m / 4 + 0.5) - 1]
    grid = torch.arange(1, n_grid + 1, dtype=torch.float64)  # (G,)
    theta = (1 - torch.sqrt(n_grid / (grid - 0.5))) / (3 * first_quartile) + 1 / excesses[-1]  # (G,)
    shapes = torch.log1p(-theta[:, None] * excesses).mean(-1)  # (G,)
    profile_log_likelihood = m * (torch.log(-theta / shapes) - shapes - 1)  # (G,)
    posterior_mean = (theta * profile_log_likelihood.softmax(0)).sum()
    shape = torch.log1p(-posterior_mean * excesses).mean()
    return (m * shape + 10 * 0.5) / (m + 10)


def _fp32(log_weights: Tensor, dim: int) -> Tensor:
    if log_weights.dim() == 0 or log_weights.size(dim) == 0:
        raise ValueError(
            f"`log_weights` must hold at least one draw along `dim`, got shape {tuple(log_weights.shape)}."
        )
    return log_weights if log_weights.dtype == torch.float64 else log_weights.float()
