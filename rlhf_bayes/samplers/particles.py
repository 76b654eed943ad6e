"""The particles of SMC, which are drawn, weighted and resampled one token at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from scipy.stats import norm
from torch import Tensor

from rlhf_bayes.lm import Completions, LanguageModel, Prompt
from rlhf_bayes.lm.decoding import Decoding, PrefixReader, draw_tokens, joined
from rlhf_bayes.numerics import importance_ess, log_z
from rlhf_bayes.samplers.draws import LogZ
from rlhf_bayes.samplers.guided import StepwiseProposal, next_tokens
from rlhf_bayes.samplers.values import Value, checked_log_value, rows_of

if TYPE_CHECKING:
    from rlhf_bayes.posterior import Posterior


MIN_EFFECTIVE_PARTICLES = 5
"""With fewer, error bars cannot be trusted. On the enumerable toy they were right down to about 3."""


@dataclass(frozen=True)
class ParticleRun:
    """n finished particles of each of P prompts; fp64, on the CPU."""

    drawn: Completions
    """P · n rows, with the log q of their tokens."""
    log_weights: Tensor
    """(P, n), nats: log-weights since the last resampling."""
    log_z: Tensor
    """(P,), nats: log Ẑ, where Ẑ is unbiased."""
    ancestor: Tensor
    """(P, n): index of the initial particle that each descends from."""
    resamplings: Tensor
    """(P,)"""
    step_variance: Tensor
    """(P,): relative variances of the factors of Ẑ, summed."""
    tokens: int
    """Completion tokens drawn, including those of particles that were not resampled."""

    @classmethod
    def joined(cls, runs: "Sequence[ParticleRun]") -> "ParticleRun":
        """One run from several runs on different prompts, in order."""
        names = ("log_weights", "log_z", "ancestor", "resamplings", "step_variance")
        tensors = {name: torch.cat([getattr(run, name) for run in runs]) for name in names}
        return cls(drawn=joined([run.drawn for run in runs]), tokens=sum(run.tokens for run in runs), **tensors)

    @property
    def variance(self) -> Tensor:
        r"""
        Relative variance of Ẑ, (P,), infinite for one particle: the larger of

            1 − (n/(n−1))^{m+1} · Σ W_i·W_j    over pairs without a common ancestor, m resamplings: consistent, noisy
            Σ (1/ESS − 1/n)·n/(n−1)            over resamplings and the end: less noisy, but ignores later steps

        Source: Lee & Whiteley 2018, arXiv 1509.00394, section 2; the second is that of independent steps.
        """
        n = self.log_weights.size(1)
        if n == 1:
            return torch.full_like(self.log_z, torch.inf)
        weights = self.log_weights.softmax(1).nan_to_num(1 / n)  # (P, n)
        by_ancestor = torch.zeros_like(weights).scatter_add(1, self.ancestor, weights)
        apart = 1 - by_ancestor.square().sum(1)  # (P,)
        genealogical = 1 - (n / (n - 1)) ** (self.resamplings + 1.0) * apart
        return torch.maximum(genealogical, self.step_variance)

    @property
    def effective_particles(self) -> Tensor:
        """(P,): 1/(V + 1/n), with V the relative variance of Ẑ, which is at most n; 0 where every weight is 0."""
        n = self.log_weights.size(1)
        return torch.where(self.log_z > -torch.inf, 1 / (self.variance + 1 / n), 0.0)

    def interval(self, confidence: float) -> LogZ:
        r"""
        log Z, from log Ẑ − z·√V up to log Ẑ + z·√V + 2·V, with V the relative variance of Ẑ and z the normal quantile.

        The upper end is further away, since log Ẑ is too low by V/2 on average, and a run that missed much of the
        posterior underestimates V too. The factor 2 was found on an enumerable toy; it is not a theorem.
        """
        variance = self.variance
        half_width = float(norm.ppf((1 + confidence) / 2)) * variance.sqrt()
        nothing = self.log_z == -torch.inf
        low = torch.where(nothing, -torch.inf, self.log_z - half_width)
        high = torch.where(nothing, torch.inf, self.log_z + half_width + 2 * variance)
        return LogZ(self.log_z, low, high, confidence)


@final
class Particles:
    """
    P · n particles while they are decoded. B = P · n; rows are grouped by prompt.

    Args:
        posterior, value, proposal, prompts, n, columns:
            As in [`SMC`].
        held (`Sequence[Sequence[int]]`, *optional*):
            P completions for a conditional run: the first particle of each prompt is held at its completion.
    """

    def __init__(
        self,
        posterior: "Posterior",
        value: Value,
        proposal: LanguageModel | StepwiseProposal | None,
        prompts: Sequence[Prompt],
        n: int,
        columns: Mapping[str, Sequence],
        held: Sequence[Sequence[int]] | None = None,
    ):
        prior = posterior.prior
        self.posterior, self.value, self.proposal = posterior, value, proposal
        self.n, self.columns, self.held = n, columns, held
        self.decoding = Decoding(prior, prompts, n)
        other = proposal.prior if isinstance(proposal, StepwiseProposal) else proposal
        self.reader = None if other is None or other is prior else PrefixReader(other)
        like = {"dtype": torch.float64, "device": prior.device}
        self.log_weights = torch.zeros(len(prompts), n, **like)  # (P, n), since the last resampling
        self.log_twist = torch.zeros(len(prompts) * n, **like)  # (B,): log ψ of the prefixes
        self.log_z = torch.zeros(len(prompts), **like)  # (P,): up to the last resampling
        self.log_q = torch.zeros(len(prompts) * n, prior.max_completion_length, device=prior.device)  # (B, T)
        self.ancestor = torch.arange(n, device=prior.device).repeat(len(prompts), 1)  # (P, n)
        self.resamplings = torch.zeros(len(prompts), dtype=torch.long, device=prior.device)
        self.step_variance = torch.zeros(len(prompts), **like)  # (P,)
        self.tokens = 0

    def run(self, ess_threshold: float, generator: torch.Generator | None) -> ParticleRun:
        """Decode all particles to their ends. `generator` must be on the prior's device."""
        while self.decoding.rows.numel():
            self._extend(generator)
            # finished particles are not resampled, since their weights are more informative than copies
            if self.decoding.rows.numel():
                self._resample(ess_threshold, generator)
        return ParticleRun(
            drawn=self.decoding.completions(self.log_q),
            log_weights=self.log_weights.cpu(),
            log_z=(self.log_z + log_z(self.log_weights)).cpu(),
            ancestor=self.ancestor.cpu(),
            resamplings=self.resamplings.cpu(),
            step_variance=(self.step_variance + relative_variance(self.log_weights)).cpu(),
            tokens=self.tokens,
        )

    def _extend(self, generator: torch.Generator | None) -> None:
        rows, step = self.decoding.rows, self.decoding.length  # (A,)
        prompts = [self.decoding.prompts[row] for row in rows.tolist()]
        log_prior = self.decoding.log_probs  # (A, V)
        log_q = self._next_log_probs(prompts, self.decoding.token_ids(rows), log_prior)
        tokens = draw_tokens(log_q, generator)
        if self.held is not None:
            holds = rows % self.n == 0  # (A,)
            tokens = tokens.masked_scatter(holds, next_tokens(self.held, rows[holds] // self.n, step))
        self.log_q[rows, step] = log_q.gather(1, tokens[:, None]).squeeze(1)
        log_ratio = (log_prior - log_q).gather(1, tokens[:, None]).squeeze(1)
        if bool((log_ratio == torch.inf).any()):
            raise ValueError(
                "`proposal` must be able to draw whatever the posterior allows, but gives probability 0 to a token of "
                "an exact draw. Look for a value that is -inf where the likelihood is not."
            )
        finished = self.decoding.append(tokens)
        self.tokens += len(tokens)
        log_twist = self._log_twist(prompts, rows, finished)
        before = self.log_twist[rows]
        # a particle of weight 0 keeps it; −inf − (−inf) would be nan
        change = torch.where(before == -torch.inf, -torch.inf, log_twist - before)
        self.log_twist[rows] = log_twist
        self.log_weights.view(-1)[rows] += log_ratio + change

    def _next_log_probs(self, prompts: list[Prompt], prefixes: list[list[int]], log_prior: Tensor) -> Tensor:
        if self.reader is not None:
            log_q = self.reader.next_log_probs(self.reader.read(prompts, prefixes).hidden).to(log_prior.device)
        else:
            log_q = log_prior
        if isinstance(self.proposal, StepwiseProposal):
            return self.proposal.next_log_probs(prompts, prefixes, log_q)
        return log_q

    def _log_twist(self, prompts: list[Prompt], rows: Tensor, finished: Tensor) -> Tensor:
        """log ψ of the prefixes in these rows: (A,), fp64."""
        result = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        prefixes = self.decoding.token_ids(rows)
        open_, whole = ((finished == end).nonzero().flatten().tolist() for end in (False, True))
        if open_:
            of = [prompts[i] for i in open_], [prefixes[i] for i in open_]
            result[open_] = checked_log_value(self.value, *of).to(result)
        if whole:
            of = [prompts[i] for i in whole], None, [prefixes[i] for i in whole]
            columns = rows_of(self.columns, (rows[whole] // self.n).tolist())
            result[whole] = self.posterior.log_likelihood(*of, columns).to(result)
        return result

    def _resample(self, ess_threshold: float, generator: torch.Generator | None) -> None:
        open_ = torch.zeros_like(self.resamplings, dtype=torch.bool)
        open_[self.decoding.rows // self.n] = True
        some = (self.log_weights > -torch.inf).any(1)
        due = open_ & some & (importance_ess(self.log_weights) < ess_threshold * self.n)  # (P,)
        if not bool(due.any()):
            return
        # multinomial: systematic resampling has less variance, but then this variance could not be estimated
        probs = self.log_weights.softmax(1).nan_to_num(1.0)  # (P, n)
        index = torch.multinomial(probs, self.n, replacement=True, generator=generator)
        if self.held is not None:
            index[:, 0] = 0
        index = torch.where(due[:, None], index, torch.arange(self.n, device=due.device))  # (P, n)
        self.log_z += torch.where(due, log_z(self.log_weights), 0.0)
        self.step_variance += torch.where(due, relative_variance(self.log_weights), 0.0)
        self.log_weights[due] = 0.0
        self.resamplings += due
        self.ancestor = self.ancestor.gather(1, index)
        flat = (index + self.n * torch.arange(len(index), device=due.device)[:, None]).flatten()  # (B,)
        self.log_twist, self.log_q = self.log_twist[flat], self.log_q[flat]
        self.decoding.reorder(flat)


def relative_variance(log_weights: Tensor) -> Tensor:
    """Estimated relative variance of the mean of n weights: (P, n) -> (P,); 0 where all weights are 0."""
    n = log_weights.size(1)
    if n == 1:
        return torch.zeros_like(log_weights[:, 0])
    ess = importance_ess(log_weights)
    return torch.where(ess > 0, (n / ess - 1).clamp(min=0) / (n - 1), 0.0)
