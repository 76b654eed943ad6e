"""Rejection sampling ("filtering"): exact with a known bound, otherwise at an estimated distance to the posterior."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rlhf_bayes.lm import Prompt, VLLMLanguageModel
from rlhf_bayes.numerics import clopper_pearson, quasi_rejection_curve
from rlhf_bayes.samplers.dependence import IndependentRows
from rlhf_bayes.samplers.draws import Draws, Guarantee, LogZ
from rlhf_bayes.samplers.protocol import Proposal, SamplerRecord
from rlhf_bayes.samplers.scored import (
    Row,
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

_ROUND = 4096
"""Most completions that are drawn at once: they are held in memory until they are weighed."""


@final
class RejectionSampler:
    r"""
    Draws from the posterior by discarding draws of a proposal:

        keep x ~ q with probability min(1, w(x)/B),    w(x) = π0(x)·exp(log_likelihood(x)) / q(x)

    **Guarantee: exact** where no weight exceeds B. From the prior, w is exp(log_likelihood), whose bound many
    posteriors know (`posterior.bound`): a condition, a log-probability, a clipped reward. Then log Z = log B + log
    acceptance, and its interval is exact too (Clopper & Pearson).

    **Guarantee: bounded** on request (`quasi` or `max_tv`): weights may exceed B, and the draws follow
    p_B ∝ min(P, B·q). Its TV and KL to the posterior are estimated from the weights of all draws (`info["tv"]`,
    `info["kl"]`), and log Z is their importance estimate.

    **From a trained policy q** no bound on the weights is known. For a posterior with a condition,
    `RejectionSampler(proposal=policy, log_bound=-math.inf, quasi=True)` is GUARD: each draw of the policy that the
    posterior allows is kept, so that all meet the condition, and they are closer to the posterior than the policy by
    −log acceptance: KL(π*‖q·b/A) = KL(π*‖q) + log A.

    Args:
        proposal ([`Proposal`], *optional*):
            q. Default: the prior.
        log_bound (`float`, *optional*):
            log B, nats. Default: `posterior.bound`, where the proposal is the prior; with an engine as prior, 0.1 nats
            more, since its log-probs are not quite those of the prior.
        quasi (`bool`):
            Whether weights may exceed the bound; they are then counted. Otherwise such a weight is an error.
        max_tv (`float`, *optional*):
            Chooses the bound instead of `log_bound`: for each prompt the smallest one whose TV to the posterior is at
            most this, estimated from `pilot` draws.
        pilot (`int`):
            Completions for each prompt that are drawn for `max_tv` and then discarded.
        max_draws (`int`):
            Most completions that are drawn for each prompt. A prompt gets fewer than n if fewer are accepted.
        confidence (`float`):
            Confidence of the interval on log Z.

    Raises:
        `ValueError`: if arguments contradict each other or are out of range.

    Source: Eikema et al. 2022, arXiv 2112.05702; GUARD: Kim et al. 2024, arXiv 2410.06716.
    """

    def __init__(
        self,
        proposal: Proposal | None = None,
        *,
        log_bound: float | None = None,
        quasi: bool = False,
        max_tv: float | None = None,
        pilot: int = 256,
        max_draws: int = 10_000,
        confidence: float = 0.95,
    ):
        check_count("pilot", pilot, at_least=2)
        check_count("max_draws", max_draws)
        if max_tv is not None and log_bound is not None:
            raise ValueError(
                f"`max_tv` chooses the bound and `log_bound` gives it, got {max_tv} and {log_bound}. Pass one."
            )
        if max_tv is not None and not 0 <= max_tv < 1:
            raise ValueError(
                f"`max_tv` must be at least 0 and below 1, got {max_tv}: no two distributions are 1 apart."
            )
        if log_bound is not None and not isinstance(log_bound, int | float):
            raise TypeError(f"`log_bound` must be a number of nats, got {type(log_bound).__name__}.")
        if log_bound is not None and not log_bound < math.inf:
            raise ValueError(f"`log_bound` must be a number of nats below infinity, got {log_bound}.")
        if log_bound == -math.inf and not quasi:
            raise ValueError(
                "`log_bound` = -inf is exceeded by every weight: each draw that the posterior allows is kept. Pass "
                "`quasi=True` to say that this is wanted."
            )
        check_confidence(confidence)
        self.proposal = proposal
        self.log_bound = log_bound
        self.quasi = quasi or max_tv is not None
        self.max_tv = max_tv
        self.pilot = pilot
        self.max_draws = max_draws
        self.confidence = confidence

    @property
    def guarantee(self) -> Guarantee:
        """`"exact"`, or `"bounded"` where weights may exceed the bound."""
        return "bounded" if self.quasi else "exact"

    def sample(
        self,
        posterior: "Posterior",
        prompts: Sequence[Prompt],
        n: int,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Draws:
        """
        n completions of each prompt, of equal weight; fewer where `max_draws` ended first.

        Arguments are those of [`Sampler.sample`]. `info` has, for each prompt, `log_bound`, `draws`, `acceptance` (up
        to the n-th accepted draw), `exceeded` (the number of weights above the bound), `tv`, and `kl` in nats (None
        where no draw was allowed). It also has `tokens`, the number of completion tokens drawn.

        Raises:
            `ValueError`: if no bound is known or a weight exceeds it; if no draw of any prompt is allowed by the
                posterior; or as in [`checked_request`].
        """
        self._check_bound_known(posterior)
        proposal = checked_request(posterior, self.proposal, prompts, n, generator, columns)
        tokens = 0
        if self.max_tv is None:
            log_bound = self.log_bound if self.log_bound is not None else self._own_bound(posterior)
            runs = [_Run(n, self.max_draws, float(log_bound)) for _ in prompts]  # type: ignore[arg-type]
        else:
            pilot = draw_scored(posterior, proposal, prompts, [self.pilot] * len(prompts), generator, columns)
            tokens += pilot.tokens
            bounds = self._chosen_bounds(pilot.log_weights.view(len(prompts), -1), prompts)
            runs = [_Run(n, self.max_draws, log_bound) for log_bound in bounds]
        with tqdm(total=n * len(prompts), desc="rejection sampling", unit="draw", delay=5, leave=False) as progress:
            while any(counts := _counts(runs)):
                scored = draw_scored(posterior, proposal, prompts, counts, generator, columns)
                tokens += scored.tokens
                log_bounds = torch.tensor([run.log_bound for run in runs], dtype=torch.float64)[scored.prompt_index]
                exceeded = scored.log_weights > log_bounds + _TOLERANCE * log_bounds.abs().clamp(min=1)
                if not self.quasi and bool(exceeded.any()):
                    self._refuse_excess(
                        scored.row(row := int(exceeded.int().argmax())), float(scored.log_weights[row])
                    )
                accepted = _accepted(scored.log_weights, log_bounds, generator)
                for index in range(len(exceeded)):
                    row = scored.row(index) if accepted[index] else None
                    runs[int(scored.prompt_index[index])].add(row, float(scored.log_weights[index]), exceeded[index])
                progress.update(sum(len(run.rows) for run in runs) - progress.n)
        # a draw that was allowed but rejected still shows that the posterior is not empty
        none_allowed = torch.tensor([max(run.log_weights) == -math.inf for run in runs])
        check_supported(none_allowed, f"{len(runs[0].log_weights)} completions drawn", prompts)
        return self._draws(runs, tokens)

    def _draws(self, runs: "list[_Run]", tokens: int) -> Draws:
        weights = [torch.tensor(run.log_weights, dtype=torch.float64) for run in runs]
        log_z = importance_log_z(weights, self.confidence) if self.quasi else self._exact_log_z(runs)
        curves = [
            quasi_rejection_curve(w, torch.tensor([run.log_bound])) for w, run in zip(weights, runs, strict=True)
        ]
        info = {
            "log_bound": [run.log_bound for run in runs],
            "draws": [len(run.log_weights) for run in runs],
            "acceptance": [len(run.rows) / run.trials for run in runs],
            "exceeded": [run.exceeded for run in runs],
            "tv": [_number(curve.tv) if self.quasi else 0.0 for curve in curves],
            "kl": [_number(curve.kl) if self.quasi else 0.0 for curve in curves],
            "tokens": tokens,
        }
        rows = [row for run in runs for row in run.rows]
        return as_draws(rows, len(runs), self.guarantee, IndependentRows(), log_z=log_z, info=info)

    def _exact_log_z(self, runs: "list[_Run]") -> LogZ:
        estimates, intervals = [], []
        for run in runs:
            k, trials = len(run.rows), run.trials
            # trials end with a success, so the rate without the last trial is unbiased
            unbiased = (k - 1) / (trials - 1) if run.full and k > 1 else k / trials
            interval = clopper_pearson(k, trials, self.confidence, stopped_at_success=run.full)
            estimates.append(run.log_bound + _log(unbiased))
            intervals.append([run.log_bound + _log(end) for end in interval])
        low, high = torch.tensor(intervals, dtype=torch.float64).T
        return LogZ(torch.tensor(estimates, dtype=torch.float64), low, high, self.confidence)

    def _chosen_bounds(self, log_weights: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        """log B of each prompt for `max_tv`, from the weights of the pilot draws (P, pilot)."""
        none_allowed = (log_weights == -torch.inf).all(-1)
        if bool(none_allowed.any()):
            raise ValueError(
                f"None of the `pilot` = {self.pilot} completions drawn is allowed by the posterior, for "
                f"{int(none_allowed.sum())} of {len(prompts)} prompts, the first "
                f"{prompts[int(none_allowed.int().argmax())]!r}: no bound can be chosen. Raise `pilot`, or give "
                "`log_bound`."
            )
        return quasi_rejection_curve(log_weights).log_bound_for(float(self.max_tv or 0)).tolist()

    def _check_bound_known(self, posterior: "Posterior") -> None:
        if self.log_bound is not None or self.max_tv is not None:
            return
        from_prior = self.proposal is None or self.proposal is posterior.prior
        if from_prior and posterior.bound is not None:
            return
        why = (
            "this posterior knows no bound on its log-likelihood"
            if from_prior
            else "none is known for the weights of a proposal other than the prior"
        )
        raise ValueError(
            f"Exact rejection sampling needs a bound on the log-weights, and {why}. Pass `max_tv`, for draws within "
            "this distance of the posterior; or `log_bound` in nats, if you know one; with `quasi=True` it may be "
            "exceeded, and `log_bound=-math.inf` keeps every draw that the posterior allows (GUARD)."
        )

    @staticmethod
    def _own_bound(posterior: "Posterior") -> Any:
        """The bound of the weights, where the prior draws."""
        engine = isinstance(posterior.prior, VLLMLanguageModel)
        return posterior.bound + ENGINE_SLACK if engine else posterior.bound  # pyright: ignore[reportOptionalOperand]

    @staticmethod
    def _refuse_excess(row: Row, log_weight: float) -> None:
        raise ValueError(
            f"The log-weight {log_weight:.6g} exceeds the bound, for completion {row.text!r} of prompt "
            f"{row.prompt!r}: draws would not be exact. Raise `log_bound`, or pass `quasi=True` to count such draws "
            "and learn how far off they leave the result. Where an engine draws, load it in the model's precision."
        )


ENGINE_SLACK = 0.1
"""Nats by which the bound of a posterior is raised where an engine draws: its log-probs are not quite the prior's."""
_TOLERANCE = 1e-4  # nats: rounding error of a sequence's log-probability in fp32


@dataclass
class _Run:
    """The draws of one prompt so far. Once n are accepted, further draws only add weights."""

    n: int
    max_draws: int
    log_bound: float
    rows: list[Row] = field(default_factory=list)
    log_weights: list[float] = field(default_factory=list)
    trials: int = 0
    exceeded: int = 0

    @property
    def full(self) -> bool:
        return len(self.rows) == self.n

    @property
    def missing(self) -> int:
        """Completions to draw next, by the acceptance rate so far, but at most four times those drawn."""
        if self.full:
            return 0
        wanted = math.ceil((self.n - len(self.rows)) * (self.trials + 1) / (len(self.rows) + 1))
        return min(wanted, max(self.n, 4 * self.trials), self.max_draws - self.trials)

    def add(self, accepted: Row | None, log_weight: float, exceeded: Any) -> None:
        self.log_weights.append(log_weight)
        self.exceeded += bool(exceeded)
        if self.full:
            return
        self.trials += 1
        if accepted is not None:
            self.rows.append(accepted)


def _counts(runs: Sequence[_Run]) -> list[int]:
    """Completions to draw of each prompt in the next round."""
    pending = sum(run.missing > 0 for run in runs)
    return [min(run.missing, max(1, _ROUND // max(pending, 1))) for run in runs]


def _accepted(log_weights: Tensor, log_bounds: Tensor, generator: torch.Generator | None) -> Tensor:
    """Whether each draw is accepted: (B,) bool."""
    device = "cpu" if generator is None else generator.device
    uniform = torch.rand(log_weights.shape, generator=generator, device=device, dtype=torch.float64).cpu()
    # −inf − (−inf) is nan, which no number is below, so a forbidden draw is never accepted
    return uniform.log() < log_weights - log_bounds


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


QUASI_TV = 0.05
"""Total variation distance that rejection may leave where no bound is known."""


def _from_flags(posterior: "Posterior", proposal: Proposal | None, n: int) -> RejectionSampler:
    if posterior.bound is not None and proposal is None:
        return RejectionSampler()
    return RejectionSampler(proposal, max_tv=QUASI_TV)


RECORD = SamplerRecord(
    sampler=RejectionSampler,
    guarantee="exact with a bound, or bounded",
    guarantees=("exact", "bounded"),
    help="conditions and clipped rewards; with `max_tv` a chosen distance; on a policy, GUARD",
    make=_from_flags,
)
