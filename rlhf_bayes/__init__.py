"""RLHF as Bayesian inference: know which distribution you train towards, and how far you are from it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lm import Completions, LanguageModel
    from .posterior import Posterior
    from .trainers import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer

# trl takes seconds to import: the layers below it do not wait for it
_HOMES = {
    "Completions": "lm",
    "GDCConfig": "trainers",
    "GDCTrainer": "trainers",
    "LanguageModel": "lm",
    "PPOConfig": "trainers",
    "PPOTrainer": "trainers",
    "Posterior": "posterior",
    "RewardConfig": "trainers",
    "RewardTrainer": "trainers",
}

__all__ = [
    "Completions",
    "GDCConfig",
    "GDCTrainer",
    "LanguageModel",
    "PPOConfig",
    "PPOTrainer",
    "Posterior",
    "RewardConfig",
    "RewardTrainer",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'rlhf_bayes' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
