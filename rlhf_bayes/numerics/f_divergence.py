"""f-divergences from a target to a policy: their exact values, and the pseudo-rewards that a policy gradient needs."""

import math

import torch
from torch import Tensor

from rlhf_bayes.numerics.divergences import check_normalised, forward_kl, js, reverse_kl, tv

DIVERGENCES = ("forward_kl", "reverse_kl", "js", "tv", "alpha")
"""Names of the f-divergences. All are 0 only where policy and target agree."""


def pseudo_rewards(log_density_ratio: Tensor, divergence: str, alpha: float | None = None) -> Tensor:
    r"""
    Pseudo-rewards `−f′(t)` at `t = π/p`, whose policy gradient descends the divergence of the policy π from p.

        ∇ D_f(π‖p) = −E_π[R(x)·∇log π(x)],    D_f(π‖p) = E_p[f(π/p)],    with s = log p − log π:

        forward_kl   f = −log t                                R = exp(s)                              0 where p = 0
        reverse_kl   f = t·log t                               R = s − 1                              −∞, refused
        js           f = ½·(t·log t − (t + 1)·log ((t+1)/2))   R = ½·(log (1 + exp(s)) − log 2)        −½·log 2
        tv           f = ½·|t − 1|                             R = ½·sign(s)                           −½
        alpha        f = (t^α − α·t + α − 1) / (α·(α − 1))     R = (exp((1−α)·s) − 1) / (1 − α)        −1 / (1 − α)

    The last column is the limit where the target is 0, a forbidden completion. α = 0 is the forward KL and α = 1 the
    reverse KL, each up to a constant in R, which no expected gradient feels. `js` is [`js`], half of the table's.

    Args:
        log_density_ratio (`torch.Tensor`): `log p − log π` of completions, p normalised, in nats, any shape; `-inf`
            where p = 0, nan for a completion to be left out.
        divergence (`str`): one of `DIVERGENCES`.
        alpha (`float`, *optional*): α in [0, 1], for `"alpha"` alone.

    Returns:
        `torch.Tensor`: shape kept, a number without unit, fp64 where it came as fp64, else fp32; nan where nan came.

    Raises:
        ValueError: if the divergence is unknown, `alpha` is missing, out of range or given to another divergence, a
            ratio is `+inf`, or the reverse KL (or α = 1) meets a forbidden completion.

    Source: Go et al. 2023, arXiv 2302.08215, Table 1; alpha: Kruszewski et al. 2025, arXiv 2512.05962.
    """
    check_divergence(divergence, alpha)
    s = log_density_ratio if log_density_ratio.dtype == torch.float64 else log_density_ratio.float()
    if bool((s == torch.inf).any()):
        raise ValueError(
            "`log_density_ratio` must be finite, -inf or nan, got +inf: a completion that was drawn has a positive "
            "probability under the policy, and a target that is not infinite. Look for a reward that is +inf."
        )
    if divergence == "forward_kl":
        return s.exp()
    if divergence == "js":
        return 0.5 * (torch.nn.functional.softplus(s) - math.log(2))
    if divergence == "tv":
        return torch.where(s.isnan(), s, 0.5 * s.sign())  # the sign of nan is 0
    if divergence == "alpha" and alpha is not None and alpha < 1:
        # expm1: near α = 1 the exponential is nearly 1
        return torch.expm1((1 - alpha) * s) / (1 - alpha)
    forbidden = int((s == -torch.inf).sum())
    if forbidden:
        name = '"reverse_kl"' if divergence == "reverse_kl" else '"alpha" with `alpha=1`, the reverse KL,'
        raise ValueError(
            f"`divergence` {name} is infinite for a policy that can draw a forbidden completion, and {forbidden} of "
            f'{s.numel()} were forbidden. Use "forward_kl", "js", "tv", or "alpha" below 1, or give forbidden '
            "completions a finite log-likelihood."
        )
    return s - 1 if divergence == "reverse_kl" else s


def f_divergence_terms(log_density_ratio: Tensor, divergence: str, alpha: float | None = None) -> Tensor:
    r"""
    What a completion drawn from π adds to the divergence: `(p/π)·f(π/p)`, whose mean over π is D_f(π‖p).

    f is that of [`pseudo_rewards`], plus the multiple of t − 1 that makes it 0 with its slope at t = 1, and so nowhere
    negative: the mean is the same for a normalised p, and an estimate cannot fall below 0.

    Args:
        log_density_ratio (`torch.Tensor`): as for [`pseudo_rewards`].
        divergence (`str`): one of `DIVERGENCES`.
        alpha (`float`, *optional*): α in [0, 1], for `"alpha"` alone.

    Returns:
        `torch.Tensor`: shape kept, in nats (`"tv"`: a probability), at least 0, fp64 where it came as fp64, else fp32;
            `+inf` for a forbidden completion under the reverse KL, nan where nan came.

    Raises:
        ValueError: if the divergence is unknown, or `alpha` does not fit it.

    Source: Go et al. 2023, arXiv 2302.08215, Table 1; for the KLs, Schulman 2020, "Approximating KL divergence".
    """
    check_divergence(divergence, alpha)
    if divergence == "alpha":
        divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(alpha or 0.0), divergence)
    terms = _terms(log_density_ratio.double(), divergence, float(alpha or 0.0))
    return terms if log_density_ratio.dtype == torch.float64 else terms.float()


def _terms(s: Tensor, divergence: str, alpha: float) -> Tensor:
    # fp64: near 0 a term is a small difference, and far from it p/π passes what fp32 holds
    forbidden = s == -torch.inf
    finite = torch.where(forbidden, 0.0, s)
    ratio = s.exp()  # p/π
    if divergence == "forward_kl":
        return torch.where(forbidden, 1.0, ratio * finite - torch.expm1(finite))
    if divergence == "reverse_kl":
        return torch.where(forbidden, torch.inf, torch.expm1(finite) - finite)
    if divergence == "js":
        # −½·s − ½·(1 + p/π)·(log (1 + exp(−s)) − log 2), with the logarithm that stays small taken out
        softplus = torch.nn.functional.softplus(s) - math.log(2)
        return torch.where(forbidden, 0.5 * math.log(2), 0.5 * (ratio * finite - (1 + ratio) * softplus))
    if divergence == "tv":
        return 0.5 * (ratio - 1).abs()
    if alpha < 0.5:
        # −(p/π)·(exp(−α·s) − 1)/α − (p/π − 1), over 1 − α: as α → 0 the forward KL, with all its digits
        return (-ratio * torch.expm1(-alpha * finite) / alpha - torch.expm1(s)) / (1 - alpha)
    return (torch.expm1(s) - torch.expm1((1 - alpha) * s) / (1 - alpha)) / alpha


def f_divergence(log_p: Tensor, log_q: Tensor, divergence: str, alpha: float | None = None) -> Tensor:
    """
    The divergence that `pseudo_rewards` descends, exact on enumerated distributions: `Σ_i p_i·f(q_i/p_i)`.

    Args:
        log_p (`torch.Tensor`): the target's normalised log-probabilities (..., N), in nats; `-inf` is probability 0.
        log_q (`torch.Tensor`): the policy's (..., N).
        divergence (`str`): one of `DIVERGENCES`.
        alpha (`float`, *optional*): α in [0, 1], for `"alpha"` alone.

    Returns:
        `torch.Tensor`: (...), in nats (`"tv"`: a probability), with gradient.

    Raises:
        ValueError: if the divergence is unknown, `alpha` does not fit it, the shapes differ, or a distribution does
            not sum to 1.

    Source: Go et al. 2023, arXiv 2302.08215, Table 1; alpha: Cressie & Read 1984, `(1 − Σ q^α p^(1−α)) / (α (1 − α))`.
    """
    check_divergence(divergence, alpha)
    if alpha is None or alpha in (0.0, 1.0):
        limits = {0.0: "forward_kl", 1.0: "reverse_kl"}
        name = divergence if alpha is None else limits[alpha]
        return {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "js": js, "tv": tv}[name](log_p, log_q)
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"`log_p` and `log_q` must have the same shape, got {tuple(log_p.shape)} and {tuple(log_q.shape)}."
        )
    check_normalised(log_p, log_q)
    # of 1 − Σ q^α p^(1−α), the form that keeps its digits: from p near α = 0, from q near α = 1
    log_base, log_other, power = (log_p, log_q, alpha) if alpha < 0.5 else (log_q, log_p, 1 - alpha)
    in_support = log_base != -torch.inf  # (..., N)
    # both terms before the difference: -inf − -inf would leave a nan in the gradient
    log_ratio = torch.where(in_support, log_other, 0.0) - torch.where(in_support, log_base, 0.0)
    deficit = torch.where(in_support, -log_base.exp() * torch.expm1(power * log_ratio), 0.0)  # (..., N)
    return deficit.sum(-1) / (alpha * (1 - alpha))


def check_divergence(divergence: str, alpha: float | None) -> None:
    """
    Refuse a name that is not an f-divergence, and an α that does not belong to it.

    Raises:
        ValueError: the argument, the rule, and what to pass.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"`divergence` must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    if divergence == "alpha":
        if alpha is None or not 0 <= alpha <= 1:
            raise ValueError(
                f'`alpha` must be in [0, 1] with `divergence="alpha"`, got {alpha}: 0 is the forward KL, 1 the '
                "reverse KL."
            )
    elif alpha is not None:
        raise ValueError(
            f'`alpha` belongs to `divergence="alpha"`, got {alpha} with {divergence!r}. Leave it out, or change the '
            "divergence."
        )
