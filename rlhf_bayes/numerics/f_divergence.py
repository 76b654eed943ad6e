"""f-divergences from a target to a policy, one record each, with pseudo-rewards and exact values."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_bayes.numerics.divergences import check_normalised, forward_kl, js, reverse_kl, tv


@dataclass(frozen=True)
class Divergence:
    """
    An f-divergence `D_f(π‖p) = E_p[f(π/p)]` of a policy π from a target p, f convex with f(1) = 0.

    Its functions take `s = log p − log π` of completions, in nats, any shape, fp64 or fp32; `-inf` where p = 0.

    Source: Go et al. 2023, arXiv 2302.08215.
    """

    help: str
    """A line of text for `--help` and for the tables of the docs."""
    pseudo_reward: Callable[[Tensor], Tensor]
    """s -> `−f′(π/p)`, without unit: `∇ D_f(π‖p) = −E_π[−f′(π/p)·∇log π]`. At `-inf` it is the limit."""
    terms: Callable[[Tensor], Tensor]
    """fp64 s -> `(p/π)·f(π/p)`, in nats, for the f whose value and slope at 1 are 0, so that it is not negative. At
    `-inf` it is the limit, which is `+inf` where `infinite_where_forbidden`."""
    exact: Callable[[Tensor, Tensor], Tensor]
    """Normalised log p, log π (..., N), in nats -> D_f (...), with gradient."""
    infinite_where_forbidden: bool
    """Whether it is infinite, and has no gradient, for a policy that can draw a completion with p = 0."""
    baseline: str
    """The one of [`~rlhf_bayes.numerics.dpg.BASELINES`] with the least noise for several completions per prompt."""


@dataclass(frozen=True)
class DivergenceFamily:
    """Divergences with a parameter α."""

    help: str
    """As in [`Divergence`]."""
    alphas: tuple[float, float]
    """The smallest and the largest α, both included."""
    typical: float
    """The α used in tables and benchmarks."""
    ends: str
    """What the divergence is at the two ends of the range, for error messages."""
    member: Callable[[float], Divergence]
    """α -> the divergence."""
    finite_for: str
    """The values of α, in words, for which the divergence is finite where completions are forbidden, for messages."""


def _tv_pseudo_reward(s: Tensor) -> Tensor:
    return torch.where(s.isnan(), s, 0.5 * s.sign())  # the sign of nan is 0


def _forward_kl_terms(s: Tensor) -> Tensor:
    forbidden, finite = _split(s)
    return torch.where(forbidden, 1.0, s.exp() * finite - torch.expm1(finite))


def _reverse_kl_terms(s: Tensor) -> Tensor:
    forbidden, finite = _split(s)
    return torch.where(forbidden, torch.inf, torch.expm1(finite) - finite)


def _js_terms(s: Tensor) -> Tensor:
    forbidden, finite = _split(s)
    # −½·s − ½·(1 + p/π)·(log (1 + exp(−s)) − log 2), written so that it is accurate for large s
    ratio, log_mean = s.exp(), softplus(s) - math.log(2)
    return torch.where(forbidden, 0.5 * math.log(2), 0.5 * (ratio * finite - (1 + ratio) * log_mean))


def _split(s: Tensor) -> tuple[Tensor, Tensor]:
    """A mask of forbidden completions, and s with 0 in their place, since a product with −inf would be nan."""
    forbidden = s == -torch.inf
    return forbidden, torch.where(forbidden, 0.0, s)


_FORWARD_KL = Divergence(
    help="KL(p‖π): covers all that the posterior wants",
    pseudo_reward=torch.exp,
    terms=_forward_kl_terms,
    exact=forward_kl,
    infinite_where_forbidden=False,
    baseline="constant",
)
_REVERSE_KL = Divergence(
    help="KL(π‖p), as RL with a KL penalty does: infinite where completions are forbidden, and refused there",
    pseudo_reward=lambda s: s - 1,
    terms=_reverse_kl_terms,
    exact=reverse_kl,
    infinite_where_forbidden=True,
    baseline="leave_one_out",
)


def _alpha(alpha: float) -> Divergence:
    """The α-divergence (Kruszewski et al. 2025, arXiv 2512.05962), which is a KL at each end, up to a constant."""
    if alpha == 0:
        return replace(_FORWARD_KL, pseudo_reward=torch.expm1)
    if alpha == 1:
        return replace(_REVERSE_KL, pseudo_reward=lambda s: s, baseline="constant")

    def terms(s: Tensor) -> Tensor:
        _, finite = _split(s)
        if alpha < 0.5:
            # −(p/π)·(exp(−α·s) − 1)/α − (p/π − 1), over 1 − α: accurate as α → 0, where it is the forward KL
            return (-s.exp() * torch.expm1(-alpha * finite) / alpha - torch.expm1(s)) / (1 - alpha)
        return (torch.expm1(s) - torch.expm1((1 - alpha) * s) / (1 - alpha)) / alpha

    return Divergence(
        help=f"the α-divergence, α = {alpha}",
        # expm1, since near α = 1 the exponential is close to 1
        pseudo_reward=lambda s: torch.expm1((1 - alpha) * s) / (1 - alpha),
        terms=terms,
        exact=lambda log_p, log_q: _exact_alpha(log_p, log_q, alpha),
        infinite_where_forbidden=False,
        baseline="constant",
    )


def _exact_pearson(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`Σ (q − p)²/p`: (..., N) -> (...)."""
    _check_distributions(log_p, log_q)
    in_support = log_p != -torch.inf  # (..., N)
    log_ratio = torch.where(in_support, log_q, 0.0) - torch.where(in_support, log_p, 0.0)
    missed = (~in_support & (log_q != -torch.inf)).any(-1)
    return torch.where(missed, torch.inf, (log_p.exp() * torch.expm1(log_ratio).square()).sum(-1))


def _check_distributions(log_p: Tensor, log_q: Tensor) -> None:
    """Raise ValueError unless two tensors (..., N) have the same shape and are normalised log-probabilities."""
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"`log_p` and `log_q` must have the same shape, got {tuple(log_p.shape)} and {tuple(log_q.shape)}."
        )
    check_normalised(log_p, log_q)


def _exact_alpha(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """`(1 − Σ q^α p^(1−α)) / (α (1 − α))` (Cressie & Read 1984): (..., N) -> (...)."""
    _check_distributions(log_p, log_q)
    # 1 − Σ q^α p^(1−α) in its accurate form: relative to p near α = 0, relative to q near α = 1
    log_base, log_other, power = (log_p, log_q, alpha) if alpha < 0.5 else (log_q, log_p, 1 - alpha)
    in_support = log_base != -torch.inf  # (..., N)
    # both terms are replaced before they are subtracted: −inf − (−inf) would leave a nan in the gradient
    log_ratio = torch.where(in_support, log_other, 0.0) - torch.where(in_support, log_base, 0.0)
    deficit = torch.where(in_support, -log_base.exp() * torch.expm1(power * log_ratio), 0.0)  # (..., N)
    return deficit.sum(-1) / (alpha * (1 - alpha))


DIVERGENCES: dict[str, Divergence | DivergenceFamily] = {
    "forward_kl": _FORWARD_KL,
    "reverse_kl": _REVERSE_KL,
    "js": Divergence(
        help="Jensen–Shannon: bounded, less noise than the KLs",
        pseudo_reward=lambda s: 0.5 * (softplus(s) - math.log(2)),
        terms=_js_terms,
        exact=js,
        infinite_where_forbidden=False,
        baseline="constant",
    ),
    "tv": Divergence(
        help="total variation: bounded, as is its pseudo-reward",
        pseudo_reward=_tv_pseudo_reward,
        terms=lambda s: 0.5 * (s.exp() - 1).abs(),
        exact=tv,
        infinite_where_forbidden=False,
        baseline="leave_one_out",
    ),
    "pearson": Divergence(
        help="Pearson's χ², E_p[(π/p − 1)²]: infinite where completions are forbidden, and refused there",
        pseudo_reward=lambda s: -2 * torch.expm1(-s),
        terms=lambda s: 4 * torch.sinh(s / 2).square(),  # (p/π)·(π/p − 1)², which is inf at s = -inf
        exact=_exact_pearson,
        infinite_where_forbidden=True,
        baseline="constant",
    ),
    # Rényi's divergence is the logarithm of a mean, so no pseudo-reward of single completions has its gradient. This
    # increases with it and is an f-divergence, Neyman's χ²: for each prompt it has the same direction and minimum.
    "renyi_2": Divergence(
        help="exp(R₂) − 1 for Rényi's divergence R₂ of order 2 of p from π: the variance of the weights p/π",
        pseudo_reward=lambda s: torch.expm1(2 * s),
        terms=lambda s: torch.expm1(s).square(),
        exact=lambda log_p, log_q: _exact_pearson(log_q, log_p),
        infinite_where_forbidden=False,
        baseline="constant",
    ),
    "alpha": DivergenceFamily(
        help="between the forward KL (`alpha` = 0) and the reverse KL (1)",
        alphas=(0.0, 1.0),
        typical=0.5,
        ends="0 is the forward KL, 1 the reverse KL",
        member=_alpha,
        finite_for="below 1",
    ),
}
"""Name -> record. Each divergence is 0 only where policy and target agree."""


def divergence_of(name: str, alpha: float | None = None) -> Divergence:
    """
    The record of an f-divergence; for a family, that of its member with the given α.

    Args:
        name (`str`): one of `DIVERGENCES`.
        alpha (`float`, *optional*): α, for a family such as `"alpha"` only.

    Raises:
        ValueError: if the name is unknown, or α is missing, out of range or given to a divergence without one.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"`divergence` must be one of {', '.join(DIVERGENCES)}, got {name!r}.")
    record = DIVERGENCES[name]
    if isinstance(record, DivergenceFamily):
        least, greatest = record.alphas
        if alpha is None or not least <= alpha <= greatest:
            raise ValueError(
                f'`alpha` must be in [{least:g}, {greatest:g}] with `divergence="{name}"`, got {alpha}: {record.ends}.'
            )
        return record.member(float(alpha))
    if alpha is not None:
        families = " or ".join(f'"{key}"' for key, other in DIVERGENCES.items() if isinstance(other, DivergenceFamily))
        raise ValueError(
            f"`alpha` belongs to `divergence={families}`, got {alpha} with {name!r}. Leave it out, or change the "
            "divergence."
        )
    return record


def divergence_cases() -> list[tuple[str, float | None]]:
    """All divergences as (name, α), families with their typical α, for rows of benchmarks and cases of tests."""
    return [(name, getattr(record, "typical", None)) for name, record in DIVERGENCES.items()]


def names_by_baseline(baseline: str) -> str:
    """Quoted names of the divergences with this default baseline (families with their typical α), for help texts."""
    return " and ".join(f"'{name}'" for name, a in divergence_cases() if divergence_of(name, a).baseline == baseline)


def finite_where_forbidden() -> list[str]:
    """Quoted names of the divergences that are finite where completions are forbidden, for error messages."""
    names = []
    for name, record in DIVERGENCES.items():
        if isinstance(record, DivergenceFamily):
            names.append(f"'{name}' {record.finite_for}")
        elif not record.infinite_where_forbidden:
            names.append(f"'{name}'")
    return names


def pseudo_rewards(log_density_ratio: Tensor, divergence: str, alpha: float | None = None) -> Tensor:
    r"""
    Pseudo-rewards `−f′(t)` at `t = π/p`, whose policy gradient descends the divergence of the policy π from p.

        ∇ D_f(π‖p) = −E_π[R(x)·∇log π(x)],    D_f(π‖p) = E_p[f(π/p)],    with s = log p − log π:

        forward_kl   f = −log t                                R = exp(s)                              0 where p = 0
        reverse_kl   f = t·log t                               R = s − 1                              −∞, refused
        js           f = ½·(t·log t − (t + 1)·log ((t+1)/2))   R = ½·(log (1 + exp(s)) − log 2)        −½·log 2
        tv           f = ½·|t − 1|                             R = ½·sign(s)                           −½
        pearson      f = (t − 1)²                              R = 2 − 2·exp(−s)                      −∞, refused
        renyi_2      f = (t − 1)²/t                            R = exp(2·s) − 1                       −1
        alpha        f = (t^α − α·t + α − 1) / (α·(α − 1))     R = (exp((1−α)·s) − 1) / (1 − α)        −1 / (1 − α)

    The last column is the limit where the target is 0, a forbidden completion. α = 0 is the forward KL and α = 1 the
    reverse KL, each up to a constant in R, which does not change the expected gradient. `js` is [`js`], half of that
    in Go et al.'s table.

    Args:
        log_density_ratio (`torch.Tensor`): `log p − log π` of completions, p normalised, in nats, any shape; `-inf`
            where p = 0, nan for a completion to be left out.
        divergence (`str`): one of `DIVERGENCES`.
        alpha (`float`, *optional*): α of a family, such as `"alpha"`.

    Returns:
        `torch.Tensor`: shape kept, a number without unit, fp64 where it came as fp64, else fp32; nan where nan came.

    Raises:
        ValueError: if the divergence is unknown, `alpha` does not fit it, a ratio is `+inf`, or a divergence that is
            infinite there meets a forbidden completion.

    Source: Go et al. 2023, arXiv 2302.08215, Table 1; alpha: Kruszewski et al. 2025, arXiv 2512.05962.
    """
    record = divergence_of(divergence, alpha)
    s = log_density_ratio if log_density_ratio.dtype == torch.float64 else log_density_ratio.float()
    if bool((s == torch.inf).any()):
        raise ValueError(
            "`log_density_ratio` must be finite, -inf or nan, got +inf: a completion that was drawn has a positive "
            "probability under the policy, and a target that is not infinite. Look for a reward that is +inf."
        )
    forbidden = int((s == -torch.inf).sum())
    if record.infinite_where_forbidden and forbidden:
        name = f'"{divergence}"' + ("" if alpha is None else f" with `alpha` = {alpha:g}")
        raise ValueError(
            f"`divergence` {name} is infinite for a policy that can draw a forbidden completion, and {forbidden} of "
            f"{s.numel()} were forbidden. Use one of {', '.join(finite_where_forbidden())}, or give forbidden "
            "completions a finite log-likelihood."
        )
    return record.pseudo_reward(s)


def f_divergence_terms(log_density_ratio: Tensor, divergence: str, alpha: float | None = None) -> Tensor:
    r"""
    Terms `(p/π)·f(π/p)` of completions drawn from π, whose mean over π is D_f(π‖p).

    f is that of [`pseudo_rewards`], plus the multiple of t − 1 that makes its slope at t = 1 equal to 0. The mean is
    the same for a normalised p, but then no term is negative, and neither is an estimate.

    Args:
        log_density_ratio (`torch.Tensor`): as in [`pseudo_rewards`].
        divergence (`str`): one of `DIVERGENCES`.
        alpha (`float`, *optional*): α of a family, such as `"alpha"`.

    Returns:
        `torch.Tensor`: shape kept, in nats (`"tv"`: a probability), at least 0, fp64 where it came as fp64, else fp32;
            `+inf` for a forbidden completion where the divergence is infinite, nan where nan came.

    Raises:
        ValueError: if the divergence is unknown, or `alpha` does not fit it.

    Source: Go et al. 2023, arXiv 2302.08215, Table 1; for the KLs, Schulman 2020, "Approximating KL divergence".
    """
    # fp64, since near s = 0 a term is a small difference, and far from 0 the ratio p/π overflows fp32
    terms = divergence_of(divergence, alpha).terms(log_density_ratio.double())
    return terms if log_density_ratio.dtype == torch.float64 else terms.float()


def f_divergence(log_p: Tensor, log_q: Tensor, divergence: str, alpha: float | None = None) -> Tensor:
    """
    The exact divergence of enumerated distributions: `Σ_i p_i·f(q_i/p_i)`.

    [`pseudo_rewards`] gives its policy gradient.

    Args:
        log_p (`torch.Tensor`): the target's normalised log-probabilities (..., N), in nats; `-inf` is probability 0.
        log_q (`torch.Tensor`): the policy's (..., N).
        divergence (`str`): one of `DIVERGENCES`.
        alpha (`float`, *optional*): α of a family, such as `"alpha"`.

    Returns:
        `torch.Tensor`: (...), in nats (`"tv"`: a probability), with gradient.

    Raises:
        ValueError: if the divergence is unknown, `alpha` does not fit it, the shapes differ, or a distribution does
            not sum to 1.

    Source: Go et al. 2023, arXiv 2302.08215, Table 1.
    """
    return divergence_of(divergence, alpha).exact(log_p, log_q)
