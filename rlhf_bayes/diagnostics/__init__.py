"""Criticism: how far a policy is from the posterior, in nats."""

from .progress import PosteriorProgress
from .report import (
    Draws,
    Estimate,
    LogZEstimate,
    PosteriorFit,
    distinct_2,
    draw,
    estimate_log_z,
    fit_table,
    plot_history,
    posterior_fit,
    samples_table,
)

__all__ = [
    "Draws",
    "Estimate",
    "LogZEstimate",
    "PosteriorFit",
    "PosteriorProgress",
    "distinct_2",
    "draw",
    "estimate_log_z",
    "fit_table",
    "plot_history",
    "posterior_fit",
    "samples_table",
]
