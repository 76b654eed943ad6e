"""Evaluates how far a policy is from a posterior, and how far the prior is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rlhf_bayes.diagnostics.estimates import LogZEstimate, PosteriorFit, posterior_fits
from rlhf_bayes.diagnostics.fit_tables import fit_table
from rlhf_bayes.diagnostics.sandwich import LogZSandwich, exact_log_weights, log_z_sandwich
from rlhf_bayes.diagnostics.scored_draws import ScoredDraws, draw
from rlhf_bayes.lm import Prompt
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.samplers import Draws, Proposal


@dataclass(frozen=True)
class Evaluation:
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
            return f"Cannot tell how far the policy is from the posterior.{bounds} {self.log_z}"
        gap, start = self.policy.gap, self.prior.gap
        assert gap is not None  # there is a log Z, so there are gaps
        assert start is not None
        text = f"KL(policy‖posterior) is {gap} nats; that of the prior was {start}."
        if self.policy.forbidden.mean > 0:
            text += f" Of the policy's completions, {100 * self.policy.forbidden.mean:.2g}% are forbidden."
        if self.policy.posterior_reward is not None:
            text += (
                f" The policy's reward is {self.policy.reward}; the posterior's is {self.policy.posterior_reward}: if "
                "that is not enough, another posterior is needed (lower β, other reward), not more training."
            )
        return text + bounds

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "beta": self.beta,
            "prompts": len(self.from_policy.prompts),
            "prior": self.prior.as_dict(),
            "policy": self.policy.as_dict(),
            "sandwich": None if self.sandwich is None else asdict(self.sandwich),
            "verdict": self.verdict,
        }

    def save(self, path: str | Path) -> None:
        """Write `as_dict` as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False), encoding="utf-8")

    def __rich__(self) -> Table:
        table = fit_table({"prior": self.prior, "policy": self.policy})
        table.caption, table.caption_justify = self.verdict, "left"
        return table


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
    sandwich = None if exact is None else log_z_sandwich(from_policy.log_weights, exact)
    return Evaluation(prior, fit, log_z, from_prior, from_policy, posterior.beta, sandwich)
