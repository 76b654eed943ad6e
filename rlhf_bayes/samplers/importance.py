"""Importance sampling: draws of a proposal that are weighted, or resampled by weight."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from rlhf_bayes.lm import Prompt
from rlhf_bayes.numerics import importance_ess, khat, khat_threshold
from rlhf_bayes.numerics.log_weights import MIN_IMPORTANCE_ESS
from rlhf_bayes.samplers.dependence import Dependence, IndependentRows, ResampledRows
from rlhf_bayes.samplers.draws import Draws, Guarantee
from rlhf_bayes.samplers.protocol import Proposal, SamplerRecord
from rlhf_bayes.samplers.scored import (
    as_draws,
    check_confidence,
    check_count,
    check_supported,
    checked_request,
    draw_scored,
    importance_log_z,
)

if TYPE_CHECKING:
    from rlhf_bayes.posterior import Posterior


@final
class ImportanceSampler:
    r"""
    Draws of a proposal q, with weights so that they represent the posterior:

        w(x) = π0(x)·exp(log_likelihood(x)) / q(x),    E_π*[f] ≈ Σ_i w_i·f(x_i) / Σ_i w_i,    Ẑ = (1/N) Σ_i w_i

    **Guarantee: consistent.** Estimates converge as draws grow. `info` has the effective sample size of the weights
    and k̂, the shape of their tail. Where `info["trustworthy"]` is false, neither the estimates nor their standard
    errors can be trusted: the posterior is too far from the proposal for this many draws. [`expectation`] gives means
    with standard errors.

    Args:
        proposal ([`Proposal`], *optional*):
            q. Default: the prior. The closer to the posterior, the better.
        num_candidates (`int`, *optional*):
            N, the number of completions drawn for each prompt, of which n are resampled by weight. They have equal
            weights and may repeat. Default: n are drawn and returned with weights.
        confidence (`float`):
            Confidence of the interval on log Z, which is normal on the log scale.

    Raises:
        `ValueError`: if an option is out of range.

    Source: Owen 2013, "Monte Carlo theory, methods and examples", chapter 9; k̂: Vehtari et al. 2024, arXiv 1507.02646;
    resampling: Rubin 1987, here systematic.
    """

    guarantee: Guarantee = "consistent"

    def __init__(
        self, proposal: Proposal | None = None, *, num_candidates: int | None = None, confidence: float = 0.95
    ):
        if num_candidates is not None:
            check_count("num_candidates", num_candidates)
        check_confidence(confidence)
        self.proposal = proposal
        self.num_candidates = num_candidates
        self.confidence = confidence

    def sample(
        self,
        posterior: "Posterior",
        prompts: Sequence[Prompt],
        n: int,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Draws:
        """
        n completions of each prompt, weighted or resampled.

        Arguments are those of [`Sampler.sample`]. `info` has, for each prompt: `importance_ess`, `khat`, `trustworthy`
        and `max_weight` (the largest share of one draw) of the completions drawn, whose number is `candidates`; and
        `distinct` (different candidates among the resampled). It also has `tokens`, the number of completion tokens
        drawn. A prompt without an allowed draw has weights of 0, or no rows if resampled, and a warning names it.

        Raises:
            `ValueError`: if no draw of any prompt is allowed by the posterior, or as in [`checked_request`].
        """
        proposal = checked_request(posterior, self.proposal, prompts, n, generator, columns)
        count = n if self.num_candidates is None else self.num_candidates
        scored = draw_scored(posterior, proposal, prompts, [count] * len(prompts), generator, columns)
        log_weights = scored.log_weights.view(len(prompts), count)
        none_allowed = (log_weights == -torch.inf).all(-1)  # (P,)
        check_supported(none_allowed, f"{count} completions drawn", prompts)
        log_z = importance_log_z(list(log_weights), self.confidence)
        info = {"candidates": count, **weight_summary(log_weights), "tokens": scored.tokens}
        rows = list(range(len(scored.drawn)))
        dependence: Dependence = IndependentRows()
        if self.num_candidates is not None:
            picked = [
                [] if none else systematic_resample(row, n, generator).tolist()
                for row, none in zip(log_weights, none_allowed.tolist(), strict=True)
            ]
            rows = [prompt * count + draw for prompt, draws in enumerate(picked) for draw in draws]
            info["distinct"] = [len(set(draws)) for draws in picked]
            dependence = ResampledRows(log_weights.softmax(-1).flatten()[rows].double().cpu())
        kept_weights = scored.log_weights if self.num_candidates is None else None
        kept = [scored.row(row) for row in rows]
        return as_draws(kept, len(prompts), self.guarantee, dependence, kept_weights, log_z, info)


def weight_summary(log_weights: Tensor) -> dict[str, list]:
    """Diagnostics of log-weights (P, n) for `info`, a number for each prompt."""
    ess = importance_ess(log_weights)
    shape = [float(khat(row)) for row in log_weights]
    n = log_weights.size(1)
    limit = khat_threshold(n) if n > 1 else -torch.inf
    share = torch.where(ess > 0, (log_weights.max(-1).values - log_weights.logsumexp(-1)).exp(), torch.nan)
    return {
        "importance_ess": ess.tolist(),
        "khat": shape,
        "trustworthy": [size >= MIN_IMPORTANCE_ESS and k < limit for size, k in zip(ess.tolist(), shape, strict=True)],
        "max_weight": share.tolist(),
    }


def systematic_resample(log_weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """
    Resample n of N draws by weight with one random number: draw i is taken ⌊n·w̄_i⌋ or ⌈n·w̄_i⌉ times.

    Args:
        log_weights (`torch.Tensor`):
            (N,), nats, not all `-inf`.
        n (`int`):
            Number of draws to take.
        generator (`torch.Generator`, *optional*):
            Makes the draw reproducible.

    Returns:
        `torch.Tensor`: (n,) indices, ascending.

    Source: Kitagawa 1996, Journal of Computational and Graphical Statistics 5.
    """
    device = "cpu" if generator is None else generator.device
    offset = torch.rand(1, generator=generator, device=device, dtype=torch.float64).cpu()
    edges = log_weights.double().softmax(0).cumsum(0)
    points = (torch.arange(n) + offset) / n * edges[-1]
    # right=True: a point on an edge belongs to the next draw, so that a draw of weight 0 is never taken
    index = torch.searchsorted(edges, points, right=True)
    return index.clamp(max=int((log_weights > -torch.inf).nonzero().max()))


RECORD = SamplerRecord(
    sampler=ImportanceSampler,
    guarantee="consistent",
    guarantees=("consistent",),
    help="the first look, and log Z: weights, their effective sample size, k̂",
    make=lambda posterior, proposal, n: ImportanceSampler(proposal),
)
