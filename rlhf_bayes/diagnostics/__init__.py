"""Criticism: how far a policy is from the posterior, in nats."""

from .control import ControlFit, control_fits, control_table, plot_control
from .model_card import PreferenceSummary, reward_model_card
from .preferences import plot_overoptimization, plot_reliability, preference_table
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
    "ControlFit",
    "Draws",
    "Estimate",
    "LogZEstimate",
    "PosteriorFit",
    "PosteriorProgress",
    "PreferenceSummary",
    "control_fits",
    "control_table",
    "distinct_2",
    "draw",
    "estimate_log_z",
    "fit_table",
    "plot_control",
    "plot_history",
    "plot_overoptimization",
    "plot_reliability",
    "posterior_fit",
    "preference_table",
    "reward_model_card",
    "samples_table",
]
