"""The model card of a reward model, filled in by its trainer."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from rlhf_bayes.diagnostics import PreferenceSummary, reward_model_card
from rlhf_bayes.numerics import agreement
from rlhf_bayes.rewards import RewardIndex
from rlhf_bayes.trainers.reward.held_out import HeldOutRewards
from rlhf_bayes.trainers.reward.reward_config import RewardConfig

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


@dataclass(frozen=True)
class TrainedReward:
    """What a reward model's trainer knows, and its card tells."""

    args: RewardConfig
    """The settings of the training."""
    index: RewardIndex
    """How the saved weights are read."""
    base_model: str | None
    """Name or path of the model that was trained."""
    train_dataset: Any
    """The pairs, a [`~datasets.Dataset`] or a stream."""
    num_processes: int
    """Processes of the training."""
    num_dropped: int
    """Pairs that were too long to train on."""
    evaluation_pairs: dict[str, torch.Tensor]
    """Rewards of the last evaluation, members first: `"chosen"` and `"rejected"`; empty where there was none."""
    annotator_error_rates: dict[str, float] | None
    """How often each annotator errs, where that was learnt."""


def reward_card(
    trained: TrainedReward, name: str, dataset_name: str | None = None, tags: list[str] | str | None = None
) -> str:
    """
    Markdown of the card: data, agreement, the last evaluation, calibration, normalisation, how to load it.

    It shows the plot `reliability.png` of the output folder, if there is one.

    Args:
        trained ([`TrainedReward`]):
            What the trainer knows.
        name (`str`):
            Name of the model.
        dataset_name (`str`, *optional*):
            Name of the dataset, for the header that the hub reads.
        tags (`list[str]` or `str`, *optional*):
            Further tags for the hub.
    """
    args, pairs, index = trained.args, trained.evaluation_pairs, trained.index
    saved = RewardIndex.load(args.output_dir)
    if saved is not None and saved.normalization == index.normalization:
        index = saved  # it knows what the saved weights hold of the scale
    # a checkpoint is saved even if rewards have diverged, and then there are no metrics
    finite = pairs and pairs["chosen"].isfinite().all() and pairs["rejected"].isfinite().all()
    judged = HeldOutRewards(**pairs) if finite else None
    plot = Path(args.output_dir, RELIABILITY_PLOT)
    settings = {setting: getattr(args, setting) for setting in _SETTINGS}
    return reward_model_card(
        name=name,
        index=index,
        data=_summary(trained, dataset_name),
        base_model=trained.base_model,
        metrics=judged and judged.metrics,
        bins=judged and judged.bins,
        reliability_plot=plot.name if judged and plot.is_file() else None,
        # settings that are unset are None, 0 or −1
        settings={setting: value for setting, value in settings.items() if value and value != -1},
        tags=[tags] if isinstance(tags, str) else list(tags or []),
    )


def _summary(trained: TrainedReward, dataset_name: str | None) -> PreferenceSummary:
    data, args = trained.train_dataset, trained.args
    known = isinstance(data, Dataset)
    columns = data.column_names if known else []
    measured = math.nan
    if "pair_votes" in columns:
        measured = agreement(torch.tensor(data["pair_votes"]))
    batch = args.train_batch_size * args.gradient_accumulation_steps * trained.num_processes
    seen = len(data) if known else args.max_steps * batch
    return PreferenceSummary(
        dataset=dataset_name or "not named",
        num_train=seen,
        num_eval=trained.evaluation_pairs["chosen"].shape[1] if trained.evaluation_pairs else 0,
        labels="votes" if "pair_votes" in columns else "probabilities" if "pair_prob" in columns else "one a pair",
        num_dropped=trained.num_dropped,
        agreement=None if math.isnan(measured) else measured,
        error_rates=trained.annotator_error_rates,
    )
