"""RLHF as Bayesian inference: know which distribution you train towards, and how far you are from it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_bayes.diagnostics import PosteriorCallback, evaluate
    from rlhf_bayes.likelihoods import (
        ClassifierLikelihood,
        Constraint,
        EnsembleLikelihood,
        Likelihood,
        MomentLikelihood,
        ProductLikelihood,
        RewardLikelihood,
    )
    from rlhf_bayes.lm import Completions, LanguageModel, VLLMLanguageModel
    from rlhf_bayes.posterior import Posterior
    from rlhf_bayes.rewards import load_reward
    from rlhf_bayes.samplers import SMC, BestOfN, ImportanceSampler, MetropolisHastings, RejectionSampler
    from rlhf_bayes.store import CompletionStore, StoredColumn
    from rlhf_bayes.trainers import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer

# trl takes seconds to import, so each name is imported when it is first used
_HOMES = {
    "BestOfN": "samplers",
    "ClassifierLikelihood": "likelihoods",
    "CompletionStore": "store",
    "Completions": "lm",
    "Constraint": "likelihoods",
    "EnsembleLikelihood": "likelihoods",
    "GDCConfig": "trainers",
    "GDCTrainer": "trainers",
    "ImportanceSampler": "samplers",
    "LanguageModel": "lm",
    "Likelihood": "likelihoods",
    "MetropolisHastings": "samplers",
    "MomentLikelihood": "likelihoods",
    "PPOConfig": "trainers",
    "PPOTrainer": "trainers",
    "Posterior": "posterior",
    "PosteriorCallback": "diagnostics",
    "ProductLikelihood": "likelihoods",
    "RejectionSampler": "samplers",
    "RewardConfig": "trainers",
    "RewardLikelihood": "likelihoods",
    "RewardTrainer": "trainers",
    "SMC": "samplers",
    "StoredColumn": "store",
    "VLLMLanguageModel": "lm",
    "evaluate": "diagnostics",
    "load_reward": "rewards",
}

__all__ = [
    "SMC",
    "BestOfN",
    "ClassifierLikelihood",
    "CompletionStore",
    "Completions",
    "Constraint",
    "EnsembleLikelihood",
    "GDCConfig",
    "GDCTrainer",
    "ImportanceSampler",
    "LanguageModel",
    "Likelihood",
    "MetropolisHastings",
    "MomentLikelihood",
    "PPOConfig",
    "PPOTrainer",
    "Posterior",
    "PosteriorCallback",
    "ProductLikelihood",
    "RejectionSampler",
    "RewardConfig",
    "RewardLikelihood",
    "RewardTrainer",
    "StoredColumn",
    "VLLMLanguageModel",
    "evaluate",
    "load_reward",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'rlhf_bayes' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"rlhf_bayes.{_HOMES[name]}"), name)
