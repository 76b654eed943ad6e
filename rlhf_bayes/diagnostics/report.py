"""How far a policy is from a posterior, in nats: estimates from draws, as numbers, a table and curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..likelihoods import checked_evidence
from ..lm import (
    Completions,
    LanguageModel,
    LMHead,
    base_causal_lm,
    scatter,
    score_completions,
    token_log_probs_and_exact_kl,
)
from ..numerics import MIN_IMPORTANCE_ESS, importance_ess, khat, khat_threshold, log_z, log_z_standard_error
from ..posterior import Posterior

NOT_TRUSTWORTHY = "not trustworthy"


@dataclass(frozen=True)
class Draws:
    """
    Completions of P prompts, n each, drawn from one distribution and scored under policy, prior and evidence.

    Log-probabilities and evidence are in nats, (P, n) fp32.
    """

    texts: list[list[str]]
    """(P, n) decoded completions."""
    log_policy: Tensor
    """log π(x | c)."""
    log_prior: Tensor
    """log π0(x | c)."""
    log_likelihood: Tensor
    """Evidence, r/β."""
    kl: Tensor
    """Σ_t KL(π(· | x_<t) ‖ π0(· | x_<t)), exact at each token: over draws from π, its mean is KL(π‖π0)."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> (P, n): what the evidence read off the completions, where it tells."""

    def as_untrained(self) -> "Draws":
        """The same completions as draws of a policy that is still the prior."""
        return replace(self, log_policy=self.log_prior, kl=torch.zeros_like(self.kl))


@dataclass(frozen=True)
class LogZEstimate:
    """log Z of each prompt and what says whether to believe it. All (P,)."""

    log_z: Tensor
    standard_error: Tensor
    importance_ess: Tensor
    khat: Tensor
    num_draws: int

    @property
    def trustworthy(self) -> Tensor:
        """(P,) bool: an effective sample size of at least 10, and k̂ below the threshold for this many draws."""
        return (self.importance_ess >= MIN_IMPORTANCE_ESS) & (self.khat < khat_threshold(self.num_draws))

    def __str__(self) -> str:
        return (
            f"log Z of {len(self.log_z)} prompts from {self.num_draws} draws each: importance ESS "
            f"{self.importance_ess.min():.0f} to {self.importance_ess.max():.0f}, k-hat at most {self.khat.max():.2f} "
            f"(trusted below {khat_threshold(self.num_draws):.2f}), {int(self.trustworthy.sum())} prompts trustworthy."
        )


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; `trustworthy` is false where neither means anything."""

    mean: float
    standard_error: float
    trustworthy: bool = True

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.standard_error:.2f}" if self.trustworthy else NOT_TRUSTWORTHY


def draw(
    source: LanguageModel,
    policy: LanguageModel,
    posterior: Posterior,
    prompts: Sequence[Any],
    n: int,
    generator: torch.Generator | None = None,
    columns: Mapping[str, Sequence] | None = None,
) -> Draws:
    """
    Draw n completions for each prompt from `source`, and score them.

    Args:
        source (`LanguageModel`):
            Where completions come from: `policy` or `posterior.prior`.
        policy (`LanguageModel`):
            π, with the tokenizer and the `max_completion_length` of the prior.
        posterior (`Posterior`):
            Gives the prior and the evidence.
        prompts (`Sequence` of `str` or of chat messages):
            P prompts.
        n (`int`):
            Completions a prompt.
        generator (`torch.Generator`, *optional*):
            Makes the draw reproducible.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of the dataset that reward functions ask for, P entries each.
    """
    drawn = source.sample(prompts, n, generator)
    rows = {name: [value for value in values for _ in range(n)] for name, values in (columns or {}).items()}
    evidence = checked_evidence(posterior.likelihood, drawn.prompts, drawn.completions, drawn.completion_ids, rows)
    log_policy, log_prior, kl = _score_under_both(policy, posterior.prior, drawn)
    return Draws(
        texts=[drawn.texts[start : start + n] for start in range(0, len(drawn), n)],
        log_policy=log_policy.view(-1, n),
        log_prior=log_prior.view(-1, n),
        log_likelihood=evidence.log_likelihood.cpu().view(-1, n),
        kl=kl.view(-1, n),
        features={name: values.cpu().view(-1, n) for name, values in evidence.features.items()},
    )


@torch.no_grad()
def _score_under_both(policy: LanguageModel, prior: LanguageModel, drawn: Completions) -> list[Tensor]:
    """log π(x), log π0(x) and the summed token KLs of each completion: three of (B,), on the CPU."""
    prompt_ids = policy.prompt_token_ids(drawn.prompts)
    heads = [LMHead.of(base_causal_lm(lm.model), lm.temperature) for lm in (policy, prior)]
    parts = []
    for start in range(0, len(drawn), policy.batch_size):
        rows = slice(start, start + policy.batch_size)
        prompts, prompt_mask = _padded(prompt_ids[rows], "left", policy.device)  # (b, C)
        completions, mask = _padded(drawn.completion_ids[rows], "right", policy.device)  # (b, T)
        hidden, prior_hidden = (
            score_completions(
                lm.model, prompts, prompt_mask, completions, mask, hidden_only=True, with_values=False
            ).hidden
            for lm in (policy, prior)
        )
        log_p, log_q, _, kl = token_log_probs_and_exact_kl(hidden, heads[0], prior_hidden, heads[1], completions[mask])
        parts.append(torch.stack([scatter(column, mask).sum(-1) for column in (log_p, log_q, kl)]).cpu())
    return list(torch.cat(parts, dim=1))


def _padded(sequences: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(ids) for ids in sequences]
    mask = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    padded, mask = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side=side) for x in (rows, mask))
    return padded.to(device), mask.to(device)


def estimate_log_z(from_prior: Draws, from_policy: Draws | None = None) -> LogZEstimate:
    r"""
    log Z of each prompt by importance sampling from the prior, or from prior and policy together.

        Ẑ = 1/N Σ_i π0(x_i)·exp(ℓ(x_i)) / q(x_i),    q = (n_0·π0 + n·π) / N,    N = n_0 + n

    The balance heuristic (Veach & Guibas 1995): unbiased, and no weight exceeds N/n_0·exp(ℓ), so that a policy that
    misses part of the posterior does no harm. The standard error is that of independent draws from q, never too small
    for the stratified ones.

    Args:
        from_prior (`Draws`):
            Drawn from the prior.
        from_policy (`Draws`, *optional*):
            Drawn from the policy for the same prompts, both scored under the same policy.
    """
    parts = [from_prior] if from_policy is None else [from_prior, from_policy]
    counts = [part.log_prior.size(1) for part in parts]
    log_weights = []
    for part in parts:
        densities = torch.stack([part.log_prior, part.log_policy][: len(parts)])  # (1 or 2, P, n)
        shares = torch.tensor(counts).log().sub(math.log(sum(counts))).view(-1, 1, 1)
        log_weights.append(part.log_prior + part.log_likelihood - (densities + shares).logsumexp(0))
    weights = torch.cat(log_weights, dim=1)  # (P, N)
    return LogZEstimate(
        log_z=log_z(weights),
        standard_error=log_z_standard_error(weights),
        importance_ess=importance_ess(weights),
        khat=torch.tensor([float(khat(row)) for row in weights]),
        num_draws=sum(counts),
    )


@dataclass(frozen=True)
class PosteriorFit:
    """A policy against a posterior, averaged over prompts: nats per sequence, `reward` in its own unit.

    Without a posterior (β = 0) there is no ELBO, log Z or gap.
    """

    reward: Estimate
    kl_to_prior: Estimate
    elbo: Estimate | None
    log_z: Estimate | None
    gap: Estimate | None
    entropy: Estimate
    distinct_2: float


def posterior_fit(draws: Draws, log_z: LogZEstimate | None, beta: float) -> PosteriorFit:
    r"""
    Estimates from completions drawn from the policy.

        ELBO = E_π[ℓ] − KL(π‖π0),    gap = log Z − ELBO = KL(π‖π*),    ℓ = r/β

    Standard errors are those of the draws for these prompts; another set of prompts may differ by more.

    Args:
        draws (`Draws`):
            Drawn from the policy.
        log_z (`LogZEstimate`, *optional*):
            Of the same prompts; None where there is no posterior.
        beta (`float`):
            Turns evidence back into reward.

    Source: Korbak, Perez & Buckley 2022, arXiv 2205.11275, equations 5 to 7; the KL as in Amini, Vieira & Cotterell
    2025, arXiv 2504.10637. The ELBO keeps the log-ratio of the tokens drawn: at the optimum it has no variance then.
    """
    log_ratio = draws.log_policy - draws.log_prior  # (P, n)
    elbo = normaliser = gap = None
    if log_z is not None:
        elbo = mean_over_draws(draws.log_likelihood - log_ratio)
        # one prompt that cannot be trusted spoils the mean
        trustworthy = bool(log_z.trustworthy.all())
        error = log_z.standard_error.square().sum().sqrt().item() / len(log_z.log_z)
        normaliser = Estimate(log_z.log_z.mean().item(), error, trustworthy)
        gap = Estimate(normaliser.mean - elbo.mean, math.hypot(error, elbo.standard_error), trustworthy)
    return PosteriorFit(
        reward=mean_over_draws(beta * draws.log_likelihood),
        kl_to_prior=mean_over_draws(draws.kl),
        elbo=elbo,
        log_z=normaliser,
        gap=gap,
        entropy=mean_over_draws(-draws.log_policy),
        distinct_2=sum(map(distinct_2, draws.texts)) / len(draws.texts),
    )


def distinct_2(texts: Sequence[str]) -> float:
    """
    Distinct pairs of neighbouring words over all pairs, in [0, 1] (Li et al. 2016, arXiv 1510.03055).

    It falls with the number of texts: compare equal numbers of them.
    """
    pairs = [pair for text in texts for pair in zip(text.split()[:-1], text.split()[1:], strict=True)]
    return len(set(pairs)) / max(len(pairs), 1)


def fit_table(fits: Mapping[str, PosteriorFit], title: str | None = None) -> Table:
    """A column per policy, a row per quantity, each with its standard error over the draws."""
    table = Table(title=title)
    table.add_column("")
    for name in fits:
        table.add_column(name, justify="right")
    rows = {
        "reward": "reward",
        "kl_to_prior": "KL to prior (nats)",
        "elbo": "ELBO (nats)",
        "log_z": "log Z (nats)",
        "gap": "gap = KL to posterior (nats)",
        "entropy": "entropy (nats)",
    }
    for name, label in rows.items():
        cells = [getattr(fit, name) for fit in fits.values()]
        table.add_row(label, *("–" if cell is None else str(cell) for cell in cells))
    table.add_row("distinct-2", *(f"{fit.distinct_2:.2f}" for fit in fits.values()))
    return table


def samples_table(prompts: Sequence[Any], draws: Mapping[str, Draws], title: str | None = None) -> Table:
    """A row per prompt, a column per set of draws: the first completion of each."""
    table = Table("prompt", *draws, title=title, show_lines=True)
    for row, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        table.add_row(*(escape(cell) for cell in (text, *(drawn.texts[row][0] for drawn in draws.values()))))
    return table


def plot_history(log_history: Sequence[Mapping[str, float]], log_z: Estimate | None, path: str | Path) -> None:
    """
    Curves of a training run as an image: reward, KL to the prior, ELBO below log Z, entropy.

    Args:
        log_history (`Sequence[Mapping[str, float]]`):
            `trainer.state.log_history`; keys as PPOTrainer logs them. Panels without data stay empty.
        log_z (`Estimate`, *optional*):
            Best possible ELBO; drawn where trustworthy.
        path (`str` or `Path`):
            Where the image goes; the suffix gives its format.
    """
    # Figure, not pyplot: no display is asked for, and the caller's backend is left alone
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = {
        "reward": ("reward", "reward"),
        "posterior/kl_to_prior": ("KL to prior", "nats per sequence"),
        "posterior/elbo": ("ELBO", "nats per sequence"),
        "entropy": ("entropy", "nats per token"),
    }
    for axes, (key, (title, unit)) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), color="C0", label=title)
        if key == "posterior/elbo" and log_z is not None and log_z.trustworthy:
            low, high = log_z.mean - 2 * log_z.standard_error, log_z.mean + 2 * log_z.standard_error
            axes.axhline(log_z.mean, color="C1", linestyle="--", label="log Z ± 2 standard errors")
            axes.axhspan(low, high, color="C1", alpha=0.2, linewidth=0)
            if points:
                steps, elbos = zip(*points, strict=True)
                axes.fill_between(steps, elbos, log_z.mean, color="C0", alpha=0.1, label="gap = KL to posterior")
            axes.legend(loc="lower right", frameon=False)
        axes.set(title=title, ylabel=unit, xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def mean_over_draws(values: Tensor) -> Estimate:
    """Mean of values (P, n) and its standard error, for these prompts."""
    n = values.size(1)
    # prompts are given, not drawn: only the spread within each counts
    variance = values.double().var(dim=1).mean() if n > 1 else torch.tensor(math.inf)
    return Estimate(values.double().mean().item(), math.sqrt(variance.item() / values.numel()))
