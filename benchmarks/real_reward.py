"""
The evidence of `real_posterior.py`'s third task: a reward model of people's preferences, and a soft condition.

The reward model is a classifier on the trunk of the prior. It learns from the votes of UKPConvArg1 (which of two
arguments convinces more) by the package's `RewardTrainer`, with the settings of `reward_methods.py`, on short pairs.
Its reward has mean 0 and standard deviation 1 on completions of the prior. The condition is that the completion names
an animal; it is worth some nats, so that no completion is forbidden.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import preference_files as files
import reward_methods
from transformers import AutoTokenizer

from rlhf_bayes import LanguageModel
from rlhf_bayes.likelihoods import Likelihood, ProductLikelihood, RewardLikelihood
from rlhf_bayes.rewards import load_reward, takes_prefixes

TRAIN_PAIRS, TEST_PAIRS = 1000, 200
LONGEST_TEXT, MAX_LENGTH = 200, 160  # characters, tokens with the prompt
NORMALIZE_SAMPLES = 512
REWARD_BETA = 0.8  # standard deviations of the reward a nat
ANIMAL_NATS = 1.5
ANIMALS = (
    "bear bird bug bunny cat chicken cow deer dog duck elephant fish fox frog horse kitten lion monkey mouse owl pig "
    "puppy rabbit sheep squirrel tiger turtle whale wolf"
)
_ANIMAL = re.compile(rf"\b({ANIMALS.replace(' ', '|')})s?\b")


@takes_prefixes
def names_an_animal(completions: Sequence[str], **columns: object) -> list[float]:
    """1 for completions that name an animal, otherwise 0."""
    return [float(_ANIMAL.search(text.lower()) is not None) for text in completions]


def trained_reward(folder: Path, base: Path, data: Path, prompts: Sequence[str], length: int) -> Path:
    """The folder of the reward model, which is trained if the folder does not exist."""
    if folder.exists():
        return folder
    settings = argparse.Namespace(model=base, learning_rate=3e-4, epochs=1.0, batch=16)
    rows = [row for row in files.load_ukp(data) if row["chosen"] != row["rejected"]]
    short = [row for row in rows if max(len(row["chosen"]), len(row["rejected"])) <= LONGEST_TEXT]
    fitting = files.fitted(short, AutoTokenizer.from_pretrained(base), MAX_LENGTH)
    pairs = files.split(fitting, 0, 0.1, TRAIN_PAIRS, TEST_PAIRS)
    method = reward_methods.METHODS["ukp"][reward_methods.VOTES]
    part = folder.with_name(f"{folder.name}.part")
    trainer = reward_methods.make_trainer(method, pairs, 0, settings, lambda step, steps: None, part)
    trainer.train()
    prior = LanguageModel(str(base), max_completion_length=length)
    drawn = prior.sample(list(prompts), n=math.ceil(NORMALIZE_SAMPLES / len(prompts)))
    trainer.normalize(drawn.prompts, drawn.completions)
    trainer.save_model()
    part.rename(folder)
    return folder


def evidence(reward_model: Path) -> Likelihood:
    """Reward model and condition as one likelihood."""
    return ProductLikelihood(
        [RewardLikelihood(load_reward(reward_model), REWARD_BETA), RewardLikelihood(names_an_animal, 1 / ANIMAL_NATS)]
    )


def as_reward(likelihood: Likelihood, beta: float) -> Callable[..., list[float]]:
    """Evidence as a reward of TRL's protocol, so that RLOO and GRPO can take it: r = β·log_likelihood."""

    @takes_prefixes
    def evidence_reward(prompts, completions, completion_ids, **columns) -> list[float]:
        return (beta * likelihood.log_likelihood(prompts, completions, completion_ids)).tolist()

    return evidence_reward
