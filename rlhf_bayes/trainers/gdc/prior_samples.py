"""Draws completions of the prior before training, for a first estimate of Z."""

from typing import Any, final

from datasets import IterableDataset
from transformers import TrainerCallback

from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer
from rlhf_bayes.trainers.rollout.prior_probe import draw_in_batches
from rlhf_bayes.trainers.rollout.scored_rollout import prompt_key


@final
class PriorSamples(TrainerCallback):
    """
    Draws `prior_samples` completions of each training prompt from the prior as training begins, unless it is resumed.

    Args:
        trainer (`RolloutTrainer`):
            The trainer, which scores them like its own rollouts and passes them to its objective.
    """

    def __init__(self, trainer: RolloutTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if state.global_step > 0:
            return
        drawing, trainer.proposal = trainer.proposal, "prior"
        trainer.model.train()
        rows = list({prompt_key(row): row for row in trainer.train_dataset}.values())
        try:
            draw_in_batches(trainer.draw, rows, args.prior_samples, args, "Draws from the prior")
        finally:
            trainer.proposal = drawing


def check_prior_samples(prior_samples: int, train_dataset: Any) -> None:
    """
    Refuse draws from the prior if the prompts are not known before training.

    Args:
        prior_samples (`int`):
            The field of the configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The prompts.

    Raises:
        ValueError: if they are a stream.
    """
    if prior_samples > 0 and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            f"`prior_samples` must be 0 with a stream as `train_dataset`, got {prior_samples}: its prompts are not "
            "known before training. Leave it out, or collect the rows: `Dataset.from_list(list(stream.take(1000)))`."
        )
