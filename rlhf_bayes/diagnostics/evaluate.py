"""Evaluates how far a policy is from a posterior, and how far the prior is."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from rlhf_bayes.diagnostics.estimates import LogZEstimate, PosteriorFit, plain_numbers, posterior_fits
from rlhf_bayes.diagnostics.fit_tables import estimates_of, fit_rows, fit_table
from rlhf_bayes.diagnostics.over_prompts import NOT_TRUSTWORTHY, Estimate, explanation, over_prompts
from rlhf_bayes.diagnostics.quantities import QUANTITIES
from rlhf_bayes.diagnostics.sandwich import LogZSandwich, exact_log_weights, log_z_sandwich
from rlhf_bayes.diagnostics.scored_draws import ScoredDraws, draw
from rlhf_bayes.lm import Prompt
from rlhf_bayes.notebook import Described, html_table
from rlhf_bayes.numerics.log_weights import weighted_mean
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.samplers import Draws, Proposal

if TYPE_CHECKING:
    from pandas import DataFrame

_ARRIVED = 0.1
"""Share of the prior's distance to the posterior below which more training is not what would raise the reward."""
_HARM = (
    "Training has led away from the posterior, further than the prior is: lower the learning rate, or go back to an "
    "earlier checkpoint."
)


@dataclass(frozen=True, repr=False)
class Evaluation(Described):
    """Estimates for prior and policy, and the draws that they come from. Prints as a table in rich."""

    prior: PosteriorFit
    """The prior, where training starts."""
    policy: PosteriorFit
    """The policy."""
    log_z: LogZEstimate
    """log Z of each prompt, and whether it can be trusted."""
    from_prior: ScoredDraws
    """The prior's completions, which may be passed to the next `evaluate` of the same prompts."""
    from_policy: ScoredDraws
    """The policy's completions."""
    beta: float | None
    """β of the posterior; None where its evidence has none."""
    sandwich: LogZSandwich | None = None
    """Bounds on log Z, where exact draws were given."""

    @property
    def verdict(self) -> str:
        """Sentences that say how far the policy is from the posterior, or why that cannot be told."""
        if self.policy.log_z is None:
            return "No posterior, so no distance to it."
        bounds = "" if self.sandwich is None else f" From exact draws, {self.sandwich}."
        if not self.policy.log_z.trustworthy:
            return f"{self._without_log_z()}{bounds} {self.log_z}"
        gap, start = self.policy.gap, self.prior.gap
        assert gap is not None  # there is a log Z, so there are gaps
        assert start is not None
        text = f"KL(policy‖posterior) is {gap} nats; that of the prior was {start}."
        if self.policy.forbidden.mean > 0:
            text += f" Of the policy's completions, {100 * self.policy.forbidden.mean:.2g}% are forbidden."
        return f"{text} {self._conclusion(gap, start)}".rstrip() + bounds

    @property
    def gain(self) -> Estimate:
        """
        Nats by which the policy is closer to the posterior than the prior: the difference of their ELBOs.

        log Z cancels in it, so it is known where the distances themselves are not. It is nan or infinite where one of
        the two draws forbidden completions.
        """
        both = (self.from_policy, self.from_prior)
        parts = [draws.log_weights for draws in both]  # (P, n) each
        of_policy, of_prior = (
            weighted_mean(part, draws.log_correction) for part, draws in zip(parts, both, strict=True)
        )
        means = of_policy - of_prior
        return over_prompts(means, sum((part.var(-1) / part.size(-1) for part in parts), torch.zeros_like(means)))

    def _without_log_z(self) -> str:
        """What is known of the distance where log Z is not."""
        gap, start, gain = self.policy.gap, self.prior.gap, self.gain
        text = "Cannot tell how far the policy is from the posterior."
        if gap is not None and start is not None and not gap.trustworthy and str(gap) != NOT_TRUSTWORTHY:
            text += f" KL(policy‖posterior) is {_in_words(gap)}; that of the prior is {_in_words(start)}."
        if math.isfinite(gain.mean):
            way = "closer to" if gain.mean >= 0 else "further from"
            text += f" log Z cancels in the difference: the policy is {_size(gain)} nats {way} the posterior than the"
            text += " prior, which may be chance." if gain.low <= 0 <= gain.high else " prior."
            if gain.high < 0:
                text += f" {_HARM}"
        return text

    def _conclusion(self, gap: Estimate, start: Estimate) -> str:
        """What follows from the size of the gap."""
        gain, posterior_reward = self.gain, self.policy.posterior_reward
        if not math.isfinite(gain.mean):
            return ""
        rewards = ""
        if posterior_reward is not None:
            rewards = f" The policy's reward is {self.policy.reward}; the posterior's is {posterior_reward}"
        if gain.high < 0:
            return _HARM + (f"{rewards}." if rewards else "")
        left = gap.mean / start.mean if start.mean > 0 else 0.0
        remains = f"Of the prior's distance, {100 * left:.0f}% is left"
        if left <= _ARRIVED:
            advice = ": if that is not enough, another posterior is needed (lower β, other reward), not more training."
            text = "The policy has arrived, as far as these draws can tell." if gap.low <= 0 else f"{remains}."
            return text + (rewards + advice if rewards else "")
        if gain.low <= 0:
            text = "Its distance cannot be told from the prior's: train longer, or with another learning rate."
            if abs(gain.mean) > 2 * gain.draws_standard_error:
                # for these prompts the difference is known
                text = f"The difference cannot be told from chance over {gain.prompts} prompts: evaluate more of them."
            return text + (f"{rewards}." if rewards else "")
        text = f"{remains}: more training can bring the policy closer"
        return text + (f", and its reward towards the posterior's.{rewards}." if rewards else ".")

    def to_pandas(self) -> "DataFrame":
        """
        A `pandas.DataFrame` with a row for each quantity of the prior and of the policy.

        Columns: `distribution`, `quantity`, `label`, `unit`, and the fields of an estimate (`mean`, `standard_error`,
        `low`, `high`, …). Quantities that are not defined, such as a gap at β = 0, are left out.
        """
        from pandas import DataFrame

        rows = []
        for distribution, fit in self._fits.items():
            for name, quantity in QUANTITIES.items():
                estimate = getattr(fit, name, None)
                if estimate is None:  # `length` is a quantity of samplers only
                    continue
                what = {"distribution": distribution, "quantity": name, "label": quantity.label}
                rows.append({**what, "unit": quantity.unit, **asdict(estimate)})
        return DataFrame(rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "beta": self.beta,
            "prompts": len(self.from_policy.prompts),
            "prior": self.prior.as_dict(),
            "policy": self.policy.as_dict(),
            "sandwich": None if self.sandwich is None else asdict(self.sandwich),
            "gain": plain_numbers(self.gain),
            "verdict": self.verdict,
        }

    def save(self, path: str | Path) -> None:
        """Write `as_dict` as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False), encoding="utf-8")

    def __rich__(self) -> Table:
        table = fit_table(self._fits)
        table.caption, table.caption_justify = f"{table.caption}\n{self.verdict}", "left"
        return table

    def _facts(self) -> dict[str, Any]:
        gaps = {name: None if fit.gap is None else str(fit.gap) for name, fit in self._fits.items()}
        prompts, each = self.from_policy.log_prob.shape
        return {"prompts": prompts, "completions_each": each, "beta": self.beta, "gap": gaps}

    def _repr_html_(self) -> str:
        estimates = [estimate for fit in self._fits.values() for estimate in estimates_of(fit)]
        table = html_table(("", *self._fits), fit_rows(self._fits), self.verdict)
        return f"{table}<p>{escape(explanation(estimates))}</p>"

    @property
    def _fits(self) -> dict[str, PosteriorFit]:
        return {"prior": self.prior, "policy": self.policy}


def evaluate(
    policy: Proposal,
    posterior: Posterior,
    prompts: Sequence[Prompt],
    n: int = 128,
    generator: torch.Generator | None = None,
    columns: Mapping[str, Sequence] | None = None,
    *,
    from_prior: ScoredDraws | None = None,
    exact_draws: Draws | None = None,
    show_progress: bool = False,
) -> Evaluation:
    r"""
    Estimate how far a policy is from a posterior, from completions of the policy and of the prior.

        log Z − ELBO = KL(π‖π*),    KL(π*‖π),    their sum,    TV(π, π*),    E_π[r],    KL(π‖π0),    log Z, …

    log Z comes from both sets of draws together, so it is precise where the prior or the policy is near the posterior.
    Where neither is, estimates are marked "not trustworthy".

    Args:
        policy (`LanguageModel` or [`~rlhf_bayes.samplers.Proposal`]):
            π: a trained model with the prior's tokenizer and `max_completion_length`, or a guided decoder.
        posterior (`Posterior`):
            π*, and with it the prior π0.
        prompts (`Sequence` of `str` or of chat messages):
            P prompts; intervals are for prompts like these.
        n (`int`, *optional*, defaults to `128`):
            Completions for each prompt, from the policy and from the prior; at least 2. Below 13, nothing that needs
            log Z is trusted.
        generator (`torch.Generator`, *optional*):
            Makes the draws reproducible.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of the dataset that reward functions ask for, P entries each.
        from_prior (`ScoredDraws`, *optional*):
            The prior's draws of an earlier evaluation, for the same prompts and posterior. Default: n new draws.
        exact_draws ([`~rlhf_bayes.samplers.Draws`], *optional*):
            Exact draws of the posterior for the same prompts, from a sampler: log Z is then bounded from above too.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`Evaluation`]

    Raises:
        ValueError: if n is below 2, there are no prompts, draws are of other prompts, or the policy has another
            support than the prior.

    Source: Korbak, Perez & Buckley 2022, arXiv 2205.11275, section 3; see [`posterior_fits`] for the estimators.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"`n` must be an integer of at least 2, completions a prompt, got {n!r}: one has no spread.")
    if from_prior is not None and from_prior.prompts != list(prompts):
        raise ValueError(
            "`from_prior` must hold draws of the prompts that are evaluated, got those of "
            f"{len(from_prior.prompts)} others. Leave it out, and they are drawn."
        )
    exact = None
    if exact_draws is not None:
        exact = exact_log_weights(exact_draws, policy, posterior, columns, list(prompts))
    # the policy comes first: if it does not fit, it is refused before anything is drawn
    from_policy = draw(policy, posterior, prompts, n, generator, columns, show_progress)
    if from_prior is None:
        from_prior = draw(posterior.prior, posterior, prompts, n, generator, columns, show_progress)
    prior, fit, log_z = posterior_fits(from_prior, from_policy, from_prior.log_prob_under(policy), posterior.beta)
    sandwich = None
    if exact is not None:
        sandwich = log_z_sandwich(from_policy.log_weights + from_policy.log_correction, exact)
        prior, fit = (_with_upper_bound(of, sandwich) for of in (prior, fit))
    return Evaluation(prior, fit, log_z, from_prior, from_policy, posterior.beta, sandwich)


def _with_upper_bound(fit: PosteriorFit, sandwich: LogZSandwich) -> PosteriorFit:
    """The fit with the upper bounds on log Z and on the gap that exact draws give, where neither can be estimated."""
    upper = sandwich.upper
    log_z, gap, elbo = fit.log_z, fit.gap, fit.elbo
    assert log_z is not None
    assert gap is not None
    assert elbo is not None
    if math.isfinite(upper.high) and not log_z.trustworthy:
        log_z = replace(log_z, at_most=upper.high)
    # the errors of both add up at worst
    most = upper.high - elbo.low
    if math.isfinite(most) and not gap.trustworthy:
        gap = replace(gap, at_most=most)
    return replace(fit, log_z=log_z, gap=gap)


def _in_words(gap: Estimate) -> str:
    if gap.at_least is None:
        return "not known" if gap.at_most is None else f"at most {gap.at_most:.2f} nats"
    more = "" if gap.at_most is None else f" and at most {gap.at_most:.2f}"
    return f"at least {gap.at_least:.2f}{more} nats"


def _size(gain: Estimate) -> str:
    """The gain without its sign."""
    if gain.mean >= 0:
        return str(gain)
    return str(replace(gain, mean=-gain.mean, low=-gain.high, high=-gain.low))
