"""The λ of given moments and their uncertainty, as numbers and as a table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from rlhf_bayes.numerics import khat_threshold
from rlhf_bayes.numerics.log_weights import MIN_IMPORTANCE_ESS

MIN_SAMPLES = 25


@dataclass(frozen=True)
class FeatureMoment:
    """One feature of an exponential family: its λ, and its mean under the prior and under π*."""

    lam: float
    """λ, in nats per unit of the feature; ±∞ for a condition, a binary feature at moment 1 or 0."""
    standard_error: float
    """Standard error of `lam` over draws; 0 for a condition."""
    wanted: float
    """The moment asked for."""
    reached: float
    """The moment under π*, estimated on the draws of the fit, where it is the wanted one up to rounding."""
    reached_standard_error: float
    """Standard error: how far the true moment of the fitted π* typically is from the wanted one."""
    prior: float
    """The moment under the prior."""


@dataclass(frozen=True)
class MomentSummary:
    """
    Estimates for an exponential family with given moments, from draws. Means over prompts, in nats.

    Standard errors are those of the draws for these prompts; other prompts may differ by more.
    """

    features: Mapping[str, FeatureMoment]
    """The features, by name."""
    log_z: float
    """Mean over prompts of log Z(c) = log E_π0[exp(λ·φ)], conditions included."""
    log_z_standard_error: float
    """Standard error of `log_z`."""
    kl: float
    """KL(π*‖π0) = λ·μ̄ − log Z, the distance from the prior that the constraints require."""
    kl_standard_error: float
    """Standard error of `kl`."""
    importance_ess: Tensor
    """(P,): effective sample size of each prompt's weights."""
    khat: Tensor
    """(P,): Pareto shape of each prompt's weights; infinite where too few of them are distinct to fit it."""
    num_samples: int
    """Draws for each prompt."""

    @property
    def num_prompts(self) -> int:
        """The number of prompts, P."""
        return len(self.importance_ess)

    @property
    def trustworthy(self) -> Tensor:
        """
        (P,) bool: at least 25 draws, an effective sample size of at least 10, and k̂ below its threshold.

        Where k̂ is infinite it could not be fitted, since features with few values make many weights equal. Then only
        the effective sample size decides.
        """
        if self.num_samples < MIN_SAMPLES:
            return torch.zeros_like(self.khat, dtype=torch.bool)
        tail = (self.khat < khat_threshold(self.num_samples)) | (self.khat == torch.inf)  # (P,)
        return (self.importance_ess >= MIN_IMPORTANCE_ESS) & tail

    def table(self, title: str | None = None) -> Table:
        """A table with a row for each feature; the caption holds the numbers that concern all of them."""
        table = Table(title=title, caption=str(self), caption_justify="left")
        table.add_column("feature")
        for name in ("λ (nats per unit)", "moment wanted", "reached", "under the prior"):
            table.add_column(name, justify="right")
        for name, feature in self.features.items():
            table.add_row(
                escape(name),
                _with_error(feature.lam, feature.standard_error),
                f"{feature.wanted:.4g}",
                _with_error(feature.reached, feature.reached_standard_error),
                f"{feature.prior:.3g}",
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        finite = self.khat[self.khat.isfinite()]
        largest = f"k̂ at most {float(finite.max()):.2f}" if len(finite) else "no k̂, for weights that tie"
        return (
            f"{self.num_prompts} prompts, {self.num_samples} draws each: importance ESS "
            f"{float(self.importance_ess.min()):.0f} to {float(self.importance_ess.max()):.0f}, "
            f"{largest} (trusted below {khat_threshold(self.num_samples):.2f}), {int(self.trustworthy.sum())} "
            f"prompts trustworthy. log Z {_with_error(self.log_z, self.log_z_standard_error)}, KL(π*‖π0) "
            f"{_with_error(self.kl, self.kl_standard_error)} nats, means over prompts."
        )


def _with_error(value: float, error: float) -> str:
    if math.isinf(value):
        return "∞: a condition" if value > 0 else "−∞: a condition"
    return f"{value:.3f} ± {error:.3f}"
