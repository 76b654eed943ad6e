"""Twisted sequential Monte Carlo: particles are weighted and resampled while they are decoded."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from rich.progress import track
from scipy.stats import t

from rlhf_bayes.lm import LanguageModel, Prompt
from rlhf_bayes.lm.decoding import generator_on
from rlhf_bayes.numerics import importance_ess
from rlhf_bayes.samplers.dependence import ParticleRows
from rlhf_bayes.samplers.draws import Draws, Guarantee, LogZ
from rlhf_bayes.samplers.guided import StepwiseProposal
from rlhf_bayes.samplers.particles import MIN_EFFECTIVE_PARTICLES, ParticleRun, Particles
from rlhf_bayes.samplers.protocol import SamplerRecord
from rlhf_bayes.samplers.scored import check_supported, checked_request
from rlhf_bayes.samplers.values import PrefixValue, Value, rows_of

if TYPE_CHECKING:
    from rlhf_bayes.posterior import Posterior


@final
class SMC:
    r"""
    Twisted SMC: n particles for each prompt are decoded token by token, and resampled by a twist of their prefixes.

        w_t  =  π0(x_t | x_<t)·ψ(x_≤t) / (q(x_t | x_<t)·ψ(x_<t)),      ψ = exp(log_value),  of whole completions
                                                                        exp(log_likelihood)
        Ẑ  =  Π over resamplings (1/n) Σ_i Π_t w_t^i

    **Guarantee: consistent.** Weighted draws converge to the posterior as n grows, and Ẑ is unbiased for every n and
    every value; a good value needs fewer particles. The draws of a prompt are not independent.

    A value should have the scale of the log-likelihood, constants included, since particles that have ended compete
    with those that have not.

    Args:
        value (`Value`):
            log ψ. The optimal one is the soft value of the posterior.
        proposal ([`~rlhf_bayes.LanguageModel`] or [`StepwiseProposal`], *optional*):
            q, over the prior's tokens. Default: the prior.
        ess_threshold (`float`):
            A prompt's particles are resampled when their effective sample size falls below this share of n. 1 always
            resamples, 0 never does, which is importance sampling.

    Raises:
        TypeError: if `value` or `proposal` does not work token by token.
        ValueError: if `ess_threshold` is outside of [0, 1].

    Source: Zhao et al. 2024, arXiv 2404.17546, section 3.
    """

    guarantee: ClassVar[Guarantee] = "consistent"

    def __init__(
        self, value: Value, proposal: LanguageModel | StepwiseProposal | None = None, ess_threshold: float = 0.5
    ):
        if not isinstance(value, Value):
            raise TypeError(f"`value` must have a method `log_value`, got {type(value).__name__}.")
        if proposal is not None and not isinstance(proposal, LanguageModel | StepwiseProposal):
            raise TypeError(
                "`proposal` must be a LanguageModel, a GuidedProposal or a GradientGuidedProposal, whose next tokens "
                f"have known probabilities, got {type(proposal).__name__}."
            )
        if not 0 <= ess_threshold <= 1:
            raise ValueError(
                f"`ess_threshold` must be between 0 and 1, a share of the particles, got {ess_threshold}."
            )
        self.value = value
        self.proposal = proposal
        self.ess_threshold = ess_threshold

    @torch.no_grad()
    def sample(
        self,
        posterior: "Posterior",
        prompts: Sequence[Prompt],
        n: int,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Draws:
        """
        n weighted particles of each prompt. Arguments are those of [`Sampler.sample`].

        As many prompts are decoded at once as the prior's `batch_size` holds, at least one.

        The interval on log Z comes from this one run ([`ParticleRun.interval`]), so it is an estimate too: it needs a
        value that does not miss the posterior. `trustworthy` says whether at least 5 particles count for Z, that is,
        whether its relative variance is below 0.2. [`SMC.sandwich`] gives bounds that need neither.

        `info`: `importance_ess` of the final weights, `effective_particles` of Z, `trustworthy`, `resamplings`,
        `ancestors` left at the end (each a list of P), and `tokens` drawn.

        Raises:
            ValueError: if an argument is wrong, a value is nan, or no draw of any prompt is allowed by the posterior.
        """
        self._check_request(posterior, prompts, n, generator, columns)
        run = self._run(posterior, prompts, n, generator, columns, None)
        nothing = (run.log_weights == -torch.inf).all(1)  # (P,)
        check_supported(nothing, f"{n} particles", prompts, stacklevel=4)  # 4: `no_grad` adds a frame
        ess, effective = importance_ess(run.log_weights), run.effective_particles
        return Draws.of(
            run.drawn,
            len(prompts),
            guarantee=self.guarantee,
            dependence=ParticleRows(run.ancestor.flatten().cpu(), run.resamplings, effective),
            log_weights=run.log_weights.flatten(),
            log_z=run.interval(0.95),
            info={
                "importance_ess": ess.tolist(),
                "effective_particles": effective.tolist(),
                "trustworthy": (effective >= MIN_EFFECTIVE_PARTICLES).tolist(),
                "resamplings": run.resamplings.tolist(),
                "ancestors": [len(set(row)) for row in run.ancestor.tolist()],
                "tokens": run.tokens,
            },
        )

    @torch.no_grad()
    def sandwich(
        self,
        posterior: "Posterior",
        exact: Draws,
        n: int,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Sequence] | None = None,
        confidence: float = 0.95,
    ) -> LogZ:
        r"""
        An interval for log Z of each prompt from two bounds, which hold for any value and number of particles.

            E[log Ẑ]  ≤  log Z  ≤  E[log Ẑ′],        Ẑ′ from a run whose particles include an exact draw

        For each exact draw a plain and a conditional run are made. The interval extends from the lower end of the
        interval for E[log Ẑ] to the upper end of that for E[log Ẑ′] (Student's t over the draws), so with a poor value
        it is wide rather than wrong. The estimate is the midpoint of the two means, whose biases cancel to first
        order.

        Args:
            posterior ([`~rlhf_bayes.Posterior`]):
                The target.
            exact ([`Draws`]):
                Exact draws from this posterior, at least 2 of each prompt: those of a [`RejectionSampler`].
            n (`int`):
                Particles of each run.
            generator, columns:
                As in `sample`; columns have an entry for each prompt of `exact`.
            confidence (`float`):
                Confidence of the interval.

        Raises:
            ValueError: if draws are not exact, there are too few of them, or the proposal cannot draw one of them.

        Source: Zhao et al. 2024, arXiv 2404.17546, section 5; Grosse, Ghahramani & Adams 2015,
        arXiv 1511.02543.
        """
        if exact.guarantee != "exact" or int(exact.counts.min()) < 2:
            raise ValueError(
                "`exact` must hold at least 2 exact draws of each prompt, got "
                f"{int(exact.counts.min())} with guarantee {exact.guarantee!r}. Draw them by a RejectionSampler with "
                "the posterior's bound; a bound on log Z from other draws would be none."
            )
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
        columns = rows_of(columns, exact.prompt_index.tolist())
        self._check_request(posterior, exact.prompts, n, generator, columns)
        plain = self._run(posterior, exact.prompts, n, generator, columns, None).log_z  # (R,)
        conditional = self._run(posterior, exact.prompts, n, generator, columns, exact.completion_ids).log_z
        low, middle, high = [], [], []
        for prompt in range(exact.num_prompts):
            rows = exact.prompt_index == prompt
            count = int(rows.sum())
            quantile = float(t.ppf((1 + confidence) / 2, count - 1)) / math.sqrt(count)
            below, above = plain[rows], conditional[rows]
            hit = bool((below > -torch.inf).all())  # a run of weight 0 gives no lower bound
            low.append(float(below.mean() - quantile * below.std()) if hit else -math.inf)
            high.append(float(above.mean() + quantile * above.std()))
            middle.append(float((below.mean() + above.mean()) / 2) if hit else float(above.mean()))
        middle, low, high = torch.tensor([middle, low, high], dtype=torch.float64)  # (P,)
        return LogZ(middle, low, high, confidence)

    def _check_request(self, posterior, prompts, n, generator, columns) -> None:
        lm = self.proposal.prior if isinstance(self.proposal, StepwiseProposal) else self.proposal
        checked_request(posterior, lm, prompts, n, generator, columns)

    def _run(
        self,
        posterior: "Posterior",
        prompts: Sequence[Prompt],
        n: int,
        generator: torch.Generator | None,
        columns: Mapping[str, Sequence] | None,
        fixed: Sequence[Sequence[int]] | None,
    ) -> ParticleRun:
        prior = posterior.prior
        generator = generator_on(prior.device, generator)
        size = max(1, prior.batch_size // n)
        parts = []
        for start in track(range(0, len(prompts), size), "SMC", transient=True, disable=len(prompts) <= size):
            rows = range(start, min(start + size, len(prompts)))
            particles = Particles(
                posterior,
                self.value,
                self.proposal,
                [prompts[row] for row in rows],
                n,
                rows_of(columns, rows),
                None if fixed is None else [fixed[row] for row in rows],
            )
            parts.append(particles.run(self.ess_threshold, generator))
        return ParticleRun.joined(parts)


def _from_flags(posterior: "Posterior", proposal: Any, n: int) -> SMC:
    # a prefix that is forbidden as a completion may have continuations that are allowed
    value = PrefixValue(posterior.likelihood, posterior.prior.tokenizer, forbidden_prefix=0.0)
    return SMC(value, proposal)


RECORD = SamplerRecord(
    sampler=SMC,
    guarantee="consistent",
    guarantees=("consistent",),
    help="rewards that show early; log Z without bias, between two bounds",
    make=_from_flags,
)
