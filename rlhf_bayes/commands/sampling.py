"""What `rlhf-bayes sample` does with one sampler, and how it compares several."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy.stats import chi2, norm
from torch import Tensor

from rlhf_bayes.diagnostics.over_prompts import CONFIDENCE
from rlhf_bayes.lm import Completions, Prompt
from rlhf_bayes.numerics.log_weights import MIN_IMPORTANCE_ESS
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.samplers import Draws, IndependentRows, Sampler, expectation
from rlhf_bayes.samplers.draws import checks_in_words


@dataclass(frozen=True)
class Mean:
    """A mean over prompts; its standard error is that of the draws, for these prompts."""

    value: float
    standard_error: float
    trustworthy: bool = True
    at_least: float | None = None
    """A lower bound, where the value cannot be trusted but a bound is known."""

    def __str__(self) -> str:
        if self.trustworthy:
            return f"{self.value:.3f} ± {self.standard_error:.3f}"
        return "not trustworthy" if self.at_least is None else f"≥ {self.at_least:.3f}"

    def as_dict(self) -> dict[str, Any]:
        found = {"mean": self.value, "standard_error": self.standard_error, "trustworthy": self.trustworthy}
        return found if self.at_least is None else {**found, "at_least": self.at_least}


@dataclass(frozen=True)
class Method:
    """The draws of one sampler, and the estimates from them."""

    name: str
    draws: Draws
    rewards: Tensor | None
    """(B,): reward of each row, where the evidence is a reward."""
    estimates: dict[str, Mean]
    """`reward`, `length` and `log_z`, those that the draws give."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary for each completion, for a file of JSON lines."""
        draws = self.draws
        return [
            {
                "prompt": draws.prompts[row],
                "completion": draws.completions[row],
                "completion_ids": draws.completion_ids[row],
                "weight": weight,
                "log_weight": None if draws.log_weights is None else draws.log_weights[row].item(),
                "reward": None if self.rewards is None else self.rewards[row].item(),
            }
            for row, weight in enumerate(draws.weights.tolist())
        ]


def draw_from_prior(
    posterior: Posterior,
    beta: float | None,
    drawn: Completions,
    num_prompts: int,
    columns: Mapping[str, Sequence],
) -> Method:
    """
    The estimates from completions of the prior. Those for other β use them, and tables compare samplers with them.

    Args:
        posterior ([`~rlhf_bayes.Posterior`]): The posterior.
        beta (`float`, *optional*): Units of reward per nat, where the evidence is a reward.
        drawn ([`~rlhf_bayes.lm.Completions`]): Completions of its prior, as many of each prompt.
        num_prompts (`int`): The number of prompts.
        columns (`Mapping[str, Sequence]`): As in [`Sampler.sample`].
    """
    return _method(
        "prior",
        Draws.of(drawn, num_prompts, guarantee="none", dependence=IndependentRows()),
        posterior,
        beta,
        columns,
    )


def draw_by(
    name: str,
    sampler: Sampler,
    posterior: Posterior,
    beta: float | None,
    prompts: Sequence[Prompt],
    n: int,
    generator: torch.Generator,
    columns: Mapping[str, Sequence],
) -> Method:
    """
    Draws of a sampler, and the means of the posterior that they estimate.

    Args:
        name (`str`): Name of the sampler, for tables.
        sampler ([`~rlhf_bayes.samplers.Sampler`]): The sampler.
        posterior, beta: As in [`draw_from_prior`].
        prompts, n, generator, columns: As in [`Sampler.sample`].
    """
    return _method(name, sampler.sample(posterior, prompts, n, generator, columns), posterior, beta, columns)


def what_if_table(
    rows: Sequence[Mapping[str, Any]],
    beta: float | None,
    source: str = "From draws of the prior alone, for these prompts.",
) -> Table:
    """A row for each β, with the one that was asked for in bold; `source` says what the estimates come from."""
    caption = f"{source} ± standard error; ESS of the worst prompt."
    if not all(row["trustworthy"] for row in rows):
        caption += " ≥ bound at 95%: the draws allow no estimate at this β."
    table = Table(title="What if β were another", caption=caption)
    for column in ("β", r"E\[r]", "KL(π*‖π0), nats", "log Z, nats", "ESS", "k̂"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            str(Mean(row[name], row[f"{name}_standard_error"], row["trustworthy"], row[f"{name}_at_least"]))
            for name in ("reward", "kl_to_prior", "log_z")
        ]
        sizes = f"{row['importance_ess']:.0f}", f"{row['khat']:.2f}" if math.isfinite(row["khat"]) else "–"
        table.add_row(f"{row['beta']:.3g}", *cells, *sizes, style="bold" if row["beta"] == beta else None)
    return table


def agreement_table(methods: Sequence[Method]) -> Table:
    """A row for each sampler; the last row says whether those that target the posterior agree within their errors."""
    caption = "± standard error of the draws, for these prompts; guarantee none: another distribution"
    table = Table(
        title="The posterior by each sampler", caption=caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    labels = {"reward": r"E\[r]", "length": r"E\[tokens]", "log_z": "log Z, nats"}
    shown = [name for name in labels if any(name in method.estimates for method in methods)]
    table.add_column("", no_wrap=True)
    table.add_column("guarantee", no_wrap=True)
    for name in shown:
        table.add_column(labels[name], justify="right", min_width=13)  # "not trustworthy" may wrap, a number may not
    for method in methods:
        cells = [str(method.estimates.get(name, "–")) for name in shown]
        table.add_row(method.name, method.draws.guarantee, *cells)
    table.add_section()
    table.add_row("do they agree?", "", *(agreement(methods, name) for name in shown))
    return table


def checks_table(methods: Sequence[Method]) -> Table:
    """A row for each sampler: the cost of its draws, and its own checks of them."""
    caption = "Checks of the worst prompt"
    if any(method.draws.guarantee == "unconverged" for method in methods):
        caption += ". Unconverged: chains disagree by more than chance; let them run longer, or start elsewhere"
    table = Table(title="How they were drawn", caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("rows", "distinct", "tokens"):
        table.add_column(column, justify="right")
    table.add_column("checks")
    for method in methods:
        draws = method.draws
        distinct = len({(i, *ids) for i, ids in zip(draws.prompt_index.tolist(), draws.completion_ids, strict=True)})
        tokens = draws.info.get("tokens", sum(map(len, draws.completion_ids)))
        table.add_row(method.name, f"{len(draws):,}", f"{distinct:,}", f"{tokens:,}", checks_in_words(draws.info))
    return table


def agreement(methods: Sequence[Method], name: str) -> str:
    r"""
    Whether independent estimates of one number differ by more than their errors, in words.

    The test is χ² = Σ (x_i − x̄)²/SE_i² about the weighted mean, with one degree of freedom fewer than there are
    estimates. Estimates without a guarantee, or not to be trusted, do not take part.
    """
    found = [method.estimates[name] for method in methods if name in method.estimates and _targets(method)]
    # an estimate that never varies has a standard error of rounding only, so it cannot be tested
    found = [mean for mean in found if mean.trustworthy and mean.standard_error > 1e-9 * abs(mean.value)]
    if len(found) < 2:
        return "–"
    values = torch.tensor([mean.value for mean in found], dtype=torch.float64)
    precisions = torch.tensor([mean.standard_error for mean in found], dtype=torch.float64) ** -2
    centre = (precisions * values).sum() / precisions.sum()
    statistic = float((precisions * (values - centre) ** 2).sum())
    return f"p = {chi2.sf(statistic, len(found) - 1):.2f}"


def _targets(method: Method) -> bool:
    return method.draws.guarantee in ("exact", "consistent")


def _method(
    name: str, draws: Draws, posterior: Posterior, beta: float | None, columns: Mapping[str, Sequence]
) -> Method:
    rows = {column: [values[p] for p in draws.prompt_index.tolist()] for column, values in columns.items()}
    rewards = None
    lengths = torch.tensor([len(ids) for ids in draws.completion_ids], dtype=torch.float64)
    estimates = {}
    if beta is not None:
        rewards = beta * posterior.log_likelihood(draws.prompts, draws.completions, draws.completion_ids, rows)
        rewards = rewards.double().cpu()  # (B,)
        estimates["reward"] = _mean(draws, rewards)
    estimates["length"] = _mean(draws, lengths)
    if draws.log_z is not None:
        half_widths = (draws.log_z.high - draws.log_z.low) / 2
        errors = half_widths / float(norm.ppf((1 + draws.log_z.confidence) / 2))
        found = _over_prompts(draws.log_z.log_z, errors, _trustworthy(draws))
        if not found.trustworthy and math.isfinite(found.value) and math.isfinite(found.standard_error):
            # all of these samplers estimate Z without bias, so log Z is too low on average
            found = replace(found, at_least=found.value - float(norm.ppf(CONFIDENCE)) * found.standard_error)
        estimates["log_z"] = found
    return Method(name, draws, rewards, estimates)


def _mean(draws: Draws, values: Tensor) -> Mean:
    if draws.guarantee != "none":
        found = expectation(draws, values)
        return _over_prompts(found.mean, found.standard_error, _trustworthy(draws))
    # without a guarantee the mean is that of the distribution drawn from, which is not the posterior
    of_prompts = [values[draws.prompt_index == prompt] for prompt in range(draws.num_prompts)]
    means = torch.stack([of.mean() for of in of_prompts])
    errors = torch.stack([of.std() / len(of) ** 0.5 for of in of_prompts])
    return _over_prompts(means, errors, True)


def _over_prompts(means: Tensor, errors: Tensor, trustworthy: bool) -> Mean:  # (P,), (P,)
    error = float(errors.square().sum().sqrt()) / len(errors)
    value = float(means.mean())
    return Mean(value, error, trustworthy and math.isfinite(value) and math.isfinite(error))


def _trustworthy(draws: Draws) -> bool:
    # the standard error is an estimate too, so it needs several independent draws of each prompt
    sizes = [
        size
        for name in ("effective_sample_size", "ancestors")
        for size in draws.info.get(name, [])
        if size is not None
    ]
    checked = draws.guarantee != "unconverged" and all(draws.info.get("trustworthy", [True]))
    return checked and min(sizes, default=math.inf) >= MIN_IMPORTANCE_ESS
