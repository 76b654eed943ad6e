"""Short trainings of reward models on pairs of the enumerable toy. Not a test module."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig as TRLRewardConfig

from rlhf_bayes import RewardConfig
from rlhf_bayes.testing import EnumerableLM

from .training import QUIET

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}


def quiet(folder: str | Path, ours: bool = False, **changes: Any) -> TRLRewardConfig:
    """A configuration for the CPU: 8 pairs a step, plain SGD so that steps show the gradient."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        **QUIET,
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
    }
    return (RewardConfig if ours else TRLRewardConfig)(**defaults | changes)


def hard_pairs(toy: EnumerableLM, count: int = 8, **columns: list) -> Dataset:
    """Pairs of different completions that the toy decodes to; `columns` beside them."""
    texts = [text for text in dict.fromkeys(toy.completions) if text]
    pairs = [(first, second) for first in texts for second in texts if first < second]
    chosen = [pairs[(5 * i) % len(pairs)][i % 2] for i in range(count)]
    rejected = [pairs[(5 * i) % len(pairs)][1 - i % 2] for i in range(count)]
    return Dataset.from_dict({"chosen": chosen, "rejected": rejected, **columns})


def classifier(toy: EnumerableLM, folder: str | Path) -> nn.Module:
    """The toy LM's trunk with a head of one label, the same at each call."""
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(toy.save(folder), num_labels=1)


def trained(kind: type, toy: EnumerableLM, args: Any, pairs: Dataset, train: bool = True, **more: Any) -> Any:
    """A trainer of this class after its training."""
    model = more.pop("model", None) or classifier(toy, Path(args.output_dir) / "base")
    trainer = kind(model, args, train_dataset=pairs, processing_class=toy.tokenizer, **more)
    if train:
        trainer.train()
    return trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def expanded(pairs: Dataset) -> Dataset:
    """One row a vote. Ties count for both, half each: two rows for each other vote keep the weights."""
    rows = []
    for row in pairs:
        chosen, rejected, tie = row["votes"]
        turned = {"chosen": row["rejected"], "rejected": row["chosen"]}
        rows += [{"chosen": row["chosen"], "rejected": row["rejected"]}] * (2 * chosen + tie)
        rows += [turned] * (2 * rejected + tie)
    return Dataset.from_list(rows)


VOTES = [[3, 1, 0], [0, 4, 0], [1, 1, 2], [4, 0, 0], [2, 1, 1], [0, 0, 4], [1, 3, 0], [2, 2, 0]]
