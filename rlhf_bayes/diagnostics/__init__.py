"""Model criticism: how far a policy is from the posterior, in nats."""

from rlhf_bayes.diagnostics.callback import PosteriorCallback
from rlhf_bayes.diagnostics.control import control_table, feature_means, guarded_forward_kl, plot_control
from rlhf_bayes.diagnostics.diversity import distinct_n, duplicates, repeated_ngrams, self_bleu
from rlhf_bayes.diagnostics.estimates import LogZEstimate, PosteriorFit, posterior_fits
from rlhf_bayes.diagnostics.evaluate import Evaluation, evaluate
from rlhf_bayes.diagnostics.fit_tables import fit_table, plot_history, samples_table
from rlhf_bayes.diagnostics.model_card import PreferenceSummary, reward_model_card
from rlhf_bayes.diagnostics.over_prompts import Estimate
from rlhf_bayes.diagnostics.progress import PosteriorProgress
from rlhf_bayes.diagnostics.reward_model_tables import plot_overoptimization, plot_reliability, preference_table
from rlhf_bayes.diagnostics.sandwich import LogZSandwich, log_z_sandwich
from rlhf_bayes.diagnostics.scored_draws import ScoredDraws, draw
from rlhf_bayes.diagnostics.trackers import log_evaluation, log_to_trackers

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
    "log_evaluation",
    "log_to_trackers",
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
