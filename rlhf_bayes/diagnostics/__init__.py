"""Criticism: how far a policy is from the posterior, in nats."""

from .callback import PosteriorCallback
from .control import control_table, feature_means, guarded_forward_kl, plot_control
from .diversity import distinct_n, duplicates, repeated_ngrams, self_bleu
from .estimates import Estimate, LogZEstimate, PosteriorFit, posterior_fits
from .evaluate import Evaluation, evaluate
from .model_card import PreferenceSummary, reward_model_card
from .preferences import plot_overoptimization, plot_reliability, preference_table
from .progress import PosteriorProgress
from .report import fit_table, plot_history, samples_table
from .sandwich import LogZSandwich, log_z_sandwich
from .scored_draws import ScoredDraws, draw

__all__ = [
    "Estimate",
    "Evaluation",
    "LogZEstimate",
    "LogZSandwich",
    "PosteriorCallback",
    "PosteriorFit",
    "PosteriorProgress",
    "PreferenceSummary",
    "ScoredDraws",
    "control_table",
    "distinct_n",
    "draw",
    "duplicates",
    "evaluate",
    "feature_means",
    "fit_table",
    "guarded_forward_kl",
    "log_z_sandwich",
    "plot_control",
    "plot_history",
    "plot_overoptimization",
    "plot_reliability",
    "posterior_fits",
    "preference_table",
    "repeated_ngrams",
    "reward_model_card",
    "samples_table",
    "self_bleu",
]
