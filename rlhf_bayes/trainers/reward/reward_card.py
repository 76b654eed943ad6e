"""The model card of a reward model, filled in by its trainer."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset

from rlhf_bayes.diagnostics import PreferenceSummary, reward_model_card
from rlhf_bayes.numerics import agreement
from rlhf_bayes.rewards import RewardIndex
from rlhf_bayes.trainers.reward.held_out import HeldOutRewards

if TYPE_CHECKING:
    from rlhf_bayes.trainers.reward.reward_trainer import RewardTrainer

RELIABILITY_PLOT = "reliability.png"
_SETTINGS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "bootstrap",
    "label_smoothing",
    "annotator_agreement",
    "annotator_reliability",
    "center_rewards_coefficient",
    "seed",
)


def reward_card(
    trainer: "RewardTrainer", name: str, dataset_name: str | None = None, tags: list[str] | str | None = None
) -> str:
    """
    Markdown of the card: data, agreement, the last evaluation, calibration, normalisation, how to load it.

    It shows the plot `reliability.png` of the output folder, if there is one.

    Args:
        trainer ([`RewardTrainer`]):
            The trainer of the reward model.
        name (`str`):
            Name of the model.
        dataset_name (`str`, *optional*):
            Name of the dataset, for the header that the hub reads.
        tags (`list[str]` or `str`, *optional*):
            Further tags for the hub.
    """
    pairs, index = trainer.evaluation_pairs, trainer.index
    saved = RewardIndex.load(trainer.args.output_dir)
    if saved is not None and saved.normalization == index.normalization:
        index = saved  # it knows what the saved weights hold of the scale
    # a checkpoint is saved even if rewards have diverged, and then there are no metrics
    finite = pairs and pairs["chosen"].isfinite().all() and pairs["rejected"].isfinite().all()
    judged = HeldOutRewards(**pairs) if finite else None
    plot = Path(trainer.args.output_dir, RELIABILITY_PLOT)
    settings = {setting: getattr(trainer.args, setting) for setting in _SETTINGS}
    return reward_model_card(
        name=name,
        index=index,
        data=_summary(trainer, dataset_name),
        base_model=trainer.model.config._name_or_path or None,
        metrics=judged and judged.metrics,
        bins=judged and judged.bins,
        reliability_plot=plot.name if judged and plot.is_file() else None,
        # settings that are unset are None, 0 or −1
        settings={setting: value for setting, value in settings.items() if value and value != -1},
        tags=[tags] if isinstance(tags, str) else list(tags or []),
    )


def _summary(trainer: "RewardTrainer", dataset_name: str | None) -> PreferenceSummary:
    data, args = trainer.train_dataset, trainer.args
    known = isinstance(data, Dataset)
    columns = data.column_names if known else []
    measured = math.nan
    if "pair_votes" in columns:
        measured = agreement(torch.tensor(data["pair_votes"]))
    batch = args.train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    seen = len(data) if known else args.max_steps * batch
    return PreferenceSummary(
        dataset=dataset_name or "not named",
        num_train=seen,
        num_eval=trainer.evaluation_pairs["chosen"].shape[1] if trainer.evaluation_pairs else 0,
        labels="votes" if "pair_votes" in columns else "probabilities" if "pair_prob" in columns else "one a pair",
        num_dropped=trainer.num_dropped.get("train", 0),
        agreement=None if math.isnan(measured) else measured,
        error_rates=trainer.annotator_error_rates,
    )
