"""How far a policy is from what was asked of it: features' means, and divergences from a posterior in nats."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .report import Draws, Estimate, distinct_2, estimate_log_z, mean_over_draws


@dataclass(frozen=True)
class ControlFit:
    """A distribution against a posterior, averaged over prompts: nats per sequence. None where it does not apply."""

    moments: Mapping[str, Estimate]
    """Mean of each feature, by name."""
    satisfaction: Estimate
    """Share of completions that are not forbidden."""
    forward_kl: Estimate
    """KL(π*‖π)."""
    reverse_kl: Estimate | None
    """KL(π‖π*); None for a policy that draws forbidden completions, of which it is infinite."""
    tv: Estimate
    """Total variation, in [0, 1]."""
    kl_to_prior: Estimate
    """KL(π‖π0)."""
    entropy: Estimate
    """−E[log π]."""
    distinct_2: float | None
    """See [`distinct_2`]; of draws only."""


def control_fits(before: Draws, after: Draws) -> dict[str, ControlFit]:
    r"""
    Prior, policy and posterior against the posterior, from draws of the first two.

        q = (n_0·π0 + n·π)/N,   w = π0·exp(ℓ)/q,   Ẑ = Σ w/N,   KL(π*‖π) = Σ w·(log π0 + ℓ − log π)/Σ w − log Ẑ

    Weights to the mixture q cannot be large where the policy misses part of the posterior (Veach & Guibas 1995).
    Standard errors are those of independent draws from q, by the delta method; they are for these prompts.

    Args:
        before ([`Draws`]):
            Drawn from the prior, scored under the policy too.
        after ([`Draws`]):
            Drawn from the policy, for the same prompts.

    Returns:
        `dict[str, ControlFit]`: "prior", "policy" and "posterior"; with forbidden completions "guarded" too, the
        policy's draws that are allowed: what [`~rlhf_bayes.samplers.RejectionSampler`] keeps of a policy, at KL(π*‖π)
        + log A for a share A (GUARD, Kim et al. 2024, arXiv 2410.06716). An estimate that rests on fewer than 10
        effective draws of a prompt is not `trustworthy`.
    """
    pooled = _Pooled.of(before, after)
    fits = {
        "prior": _of_draws(before.as_untrained(), pooled, pooled.log_prior),
        "policy": _of_draws(after, pooled, pooled.log_policy),
    }
    if bool((pooled.log_likelihood == -torch.inf).any()):
        fits["guarded"] = _guarded(after, pooled)
    return fits | {"posterior": _of_posterior(before, after, pooled)}


@dataclass(frozen=True)
class _Pooled:
    """Draws of prior and policy as one sample of their mixture: (P, N), fp64, nats; and per prompt (P,)."""

    log_prior: Tensor
    log_policy: Tensor
    log_likelihood: Tensor
    log_mixture: Tensor
    log_z: Tensor
    log_z_error: Tensor
    trustworthy: bool

    @classmethod
    def of(cls, before: Draws, after: Draws) -> "_Pooled":
        names = ("log_prior", "log_policy", "log_likelihood")
        columns = {name: torch.cat([getattr(d, name) for d in (before, after)], dim=1).double() for name in names}
        counts = torch.tensor([before.log_prior.size(1), after.log_prior.size(1)], dtype=torch.float64)
        shares = (counts / counts.sum()).log()[:, None, None]
        densities = torch.stack([columns["log_prior"], columns["log_policy"]])  # (2, P, N)
        log_z = estimate_log_z(before, after)
        return cls(
            **columns,
            log_mixture=(densities + shares).logsumexp(0),
            log_z=log_z.log_z.double(),
            log_z_error=log_z.standard_error.double(),
            trustworthy=bool(log_z.trustworthy.all()),
        )

    @property
    def log_target(self) -> Tensor:
        """log π*."""
        return self.log_prior + self.log_likelihood - self.log_z[:, None]

    @property
    def weights(self) -> Tensor:
        """π*/q, of mean 1 for each prompt."""
        return (self.log_target - self.log_mixture).exp()

    def mean(self, values: Tensor, log_zs: float = 0.0) -> Estimate:
        """E_π*[values], values (P, N), which hold log Z so many times: their errors go together."""
        weights = self.weights
        # a forbidden completion counts for nothing, whatever its value
        values = torch.where(weights > 0, values, 0.0)
        means = (weights * values).mean(1, keepdim=True)  # (P, 1)
        influence = weights * (values - means) + log_zs * (weights - 1.0)
        return self._estimate(means, influence)

    def tv(self, log_pi: Tensor) -> Estimate:
        """½·E_q[|π* − π|/q]."""
        terms = (self.weights - (log_pi - self.log_mixture).exp()).abs() / 2
        means = terms.mean(1, keepdim=True)
        return self._estimate(means, terms - means)

    def _estimate(self, means: Tensor, influence: Tensor) -> Estimate:
        variances = influence.square().mean(1) / influence.size(1)  # (P,)
        return Estimate(means.mean().item(), variances.sum().sqrt().item() / len(variances), self.trustworthy)


def _of_draws(draws: Draws, pooled: _Pooled, log_pi: Tensor) -> ControlFit:
    forbidden = draws.log_likelihood == -torch.inf  # (P, n)
    log_weights = draws.log_prior + draws.log_likelihood - draws.log_policy
    reverse_kl = None
    if not forbidden.any():
        elbo, error = mean_over_draws(log_weights), pooled.log_z_error.square().sum().sqrt().item() / len(pooled.log_z)
        gap = pooled.log_z.mean().item() - elbo.mean
        reverse_kl = Estimate(gap, math.hypot(error, elbo.standard_error), pooled.trustworthy)
    return ControlFit(
        moments={name: mean_over_draws(values) for name, values in draws.features.items()},
        satisfaction=mean_over_draws(1.0 - forbidden.double()),
        forward_kl=pooled.mean(pooled.log_target - log_pi, log_zs=-1.0),
        reverse_kl=reverse_kl,
        tv=pooled.tv(log_pi),
        kl_to_prior=mean_over_draws(draws.kl),
        entropy=mean_over_draws(-draws.log_policy),
        distinct_2=sum(map(distinct_2, draws.texts)) / len(draws.texts),
    )


def _guarded(draws: Draws, pooled: _Pooled) -> ControlFit:
    allowed = (draws.log_likelihood > -torch.inf).double()  # (P, n)
    share = allowed.mean(1, keepdim=True)  # A, (P, 1)
    share_error = ((1.0 - share) / share / allowed.size(1)).sum().sqrt().item() / len(share)  # of the mean log A
    trustworthy = pooled.trustworthy and bool((share > 0).all())

    def mean(values: Tensor, log_shares: float = 0.0) -> Estimate:
        """Of allowed draws, for values (P, n) that hold log A so many times."""
        values = torch.where(allowed > 0, values.double(), 0.0)
        means = (allowed * values).sum(1, keepdim=True) / allowed.sum(1, keepdim=True)
        influence = allowed / share * (values - means) + log_shares * (allowed / share - 1.0)
        error = (influence.square().mean(1) / influence.size(1)).sum().sqrt().item() / len(share)
        return Estimate(means.mean().item(), error, trustworthy)

    forward_kl = pooled.mean(pooled.log_target - pooled.log_policy + share.log(), log_zs=-1.0)
    log_pi = torch.where(pooled.log_likelihood > -torch.inf, pooled.log_policy - share.log(), -torch.inf)
    log_draws = draws.log_policy - share.log()  # log-density of an allowed draw
    log_target = draws.log_prior + draws.log_likelihood - pooled.log_z[:, None]
    reverse_kl = mean(log_draws - log_target, log_shares=-1.0)
    log_z_error = pooled.log_z_error.square().sum().sqrt().item() / len(share)
    return ControlFit(
        moments={name: mean(values) for name, values in draws.features.items()},
        satisfaction=Estimate(1.0, 0.0),
        forward_kl=Estimate(forward_kl.mean, math.hypot(forward_kl.standard_error, share_error), trustworthy),
        reverse_kl=Estimate(reverse_kl.mean, math.hypot(reverse_kl.standard_error, log_z_error), trustworthy),
        tv=pooled.tv(log_pi),
        kl_to_prior=mean(log_draws - draws.log_prior, log_shares=-1.0),
        entropy=mean(-log_draws, log_shares=1.0),
        distinct_2=None,
    )


def _of_posterior(before: Draws, after: Draws, pooled: _Pooled) -> ControlFit:
    nothing = Estimate(0.0, 0.0)
    features = {name: torch.cat([before.features[name], after.features[name]], 1).double() for name in after.features}
    return ControlFit(
        moments={name: pooled.mean(values) for name, values in features.items()},
        satisfaction=Estimate(1.0, 0.0),
        forward_kl=nothing,
        reverse_kl=nothing,
        tv=nothing,
        kl_to_prior=pooled.mean(pooled.log_target - pooled.log_prior, log_zs=-1.0),
        entropy=pooled.mean(-pooled.log_target, log_zs=1.0),
        distinct_2=None,
    )


def control_table(fits: Mapping[str, ControlFit], wanted: Mapping[str, float], title: str | None = None) -> Table:
    """
    A column for each distribution, a row for each quantity with its standard error over the draws.

    Args:
        fits (`Mapping[str, ControlFit]`):
            By the name of the column.
        wanted (`Mapping[str, float]`):
            name -> the mean asked for, of each feature.
        title (`str`, *optional*):
            Above it.
    """
    table = Table(title=title)
    table.add_column("")
    for name in fits:
        table.add_column(name, justify="right")
    for name, moment in wanted.items():
        table.add_row(f"{escape(name)}, {moment:g} wanted", *(str(fit.moments[name]) for fit in fits.values()))
    rows = {
        "satisfaction": "not forbidden",
        "forward_kl": "KL(π*‖π) (nats)",
        "reverse_kl": "KL(π‖π*) (nats)",
        "tv": "total variation",
        "kl_to_prior": "KL to prior (nats)",
        "entropy": "entropy (nats)",
    }
    if all(fit.satisfaction.mean == 1.0 for fit in fits.values()):
        del rows["satisfaction"]  # nothing is forbidden
    for quantity, label in rows.items():
        cells = [getattr(fit, quantity) for fit in fits.values()]
        table.add_row(label, *("∞" if cell is None else str(cell) for cell in cells))
    shares = ["–" if fit.distinct_2 is None else f"{fit.distinct_2:.2f}" for fit in fits.values()]
    table.add_row("distinct-2", *shares)
    return table


def plot_control(
    log_history: Sequence[Mapping[str, float]],
    wanted: Mapping[str, float],
    kl_to_prior: Estimate,
    path: str | Path,
) -> None:
    """
    Curves of a run of [`~rlhf_bayes.GDCTrainer`] as an image: moments, divergences from the posterior, KL to the
    prior, entropy.

    Args:
        log_history (`Sequence[Mapping[str, float]]`):
            `trainer.state.log_history`. Panels without data stay empty.
        wanted (`Mapping[str, float]`):
            name -> the mean asked for, of each feature: dashed lines.
        kl_to_prior (`Estimate`):
            KL(π*‖π0), where the policy should end; drawn where trustworthy.
        path (`str` or `Path`):
            Where the image goes; the suffix gives its format.
    """
    # Figure, not pyplot: no display is asked for, and the caller's backend is left alone
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    moments, divergences, prior, entropy = figure.subplots(2, 2).flat

    def curve(axes, key: str, label: str, color: str) -> None:
        points = [
            (entry["step"], entry[key], entry.get(f"{key}_standard_error", 0.0))
            for entry in log_history
            if key in entry
        ]
        if points:
            steps, values, errors = map(torch.tensor, zip(*points, strict=True))
            axes.plot(steps, values, color=color, label=label)
            axes.fill_between(steps, values - 2 * errors, values + 2 * errors, color=color, alpha=0.2, linewidth=0)

    for index, (name, moment) in enumerate(wanted.items()):
        curve(moments, f"posterior/moments/{name}", name, f"C{index}")
        moments.axhline(moment, color=f"C{index}", linestyle="--", linewidth=1)
    curve(divergences, "posterior/forward_kl", "KL(π*‖π), nats", "C0")
    curve(divergences, "posterior/tv", "total variation", "C2")
    divergences.axhline(0, color="black", linewidth=0.5)
    curve(prior, "posterior/kl_to_prior", "KL(π‖π0)", "C0")
    if kl_to_prior.trustworthy:
        prior.axhline(kl_to_prior.mean, color="C1", linestyle="--", label="KL(π*‖π0)")
    curve(entropy, "entropy", "entropy", "C0")
    titles = {
        moments: ("means of the features, and those wanted", "share or mean"),
        divergences: ("divergence from the posterior ± 2 standard errors", "nats; TV in [0, 1]"),
        prior: ("KL to prior", "nats per sequence"),
        entropy: ("entropy", "nats per token"),
    }
    for axes, (title, unit) in titles.items():
        axes.set(title=title, ylabel=unit, xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not entropy and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
