"""
Contact with TRL's `RewardTrainer`: a trainer that scores pairs with any number of members.

`RewardTrainer` prepares data and optimises. It reads one logit, drops columns that it does not know, and averages
metrics over batches. `PreferenceTrainer` adds a hook for the loss (`pair_loss`), keeps `PAIR_COLUMNS`, and computes
the metrics of an evaluation on all of its pairs at once.

`PRIVATE_NAMES` lists the names that this relies on; `tests/trainers/_trl/test_preference_trainer.py` fails by name
when a TRL release moves one.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import RewardTrainer as TRLRewardTrainer

from rlhf_bayes.rewards.lengths import LengthLimit
from rlhf_bayes.trainers._trl.fault_tolerance import FaultTolerantTrainer
from rlhf_bayes.trainers.reward.preference_data import PAIR_COLUMNS, PairCollator, fit_length

PRIVATE_NAMES = {
    # overridden: called by TRL or transformers with these parameters
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "_set_signature_columns_if_needed": (),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "create_model_card": ("model_name", "dataset_name", "tags"),
}
PRIVATE_ATTRIBUTES = ("_metrics", "_total_train_tokens", "_signature_columns")

_STATE = "preference_state.pt"


class PairRewards(NamedTuple):
    """Rewards of a micro-batch's pairs, before any normalisation."""

    chosen: Tensor
    """(B, K), with gradient in training."""
    rejected: Tensor
    """(B, K)."""


class PreferenceTrainer(FaultTolerantTrainer, TRLRewardTrainer):
    """TRL's reward trainer for other losses. Not for direct use: see [`RewardTrainer`]."""

    def __init__(self, model, args, positions: int | None = None, **trl_arguments):
        self.positions = (
            positions  # texts with more tokens than this are too long for the model, whatever `max_length` is
        )
        self.num_dropped: dict[str, int] = {}
        self._train_prepared = False
        super().__init__(model, args, **trl_arguments)
        self.data_collator = PairCollator(self.data_collator)
        self._eval_rows: list[dict[str, Tensor]] = []

    # Hooks

    def judged(self, dataset: Any, args: Any, name: str) -> Any:
        """The dataset with those of `PAIR_COLUMNS` that `pair_loss` needs. Called before the trainer is set up."""
        return dataset

    def score(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """The model's output for (2B, L) tokens, with `logits` (2B, K)."""
        return model(**inputs, use_cache=False)

    def pair_loss(self, rewards: PairRewards, batch: dict[str, Tensor]) -> Tensor:
        """Mean over this micro-batch of the loss: (). Defined by the objective."""
        raise NotImplementedError(f"{type(self).__name__} must define `pair_loss`.")

    def pair_metrics(self, chosen: Tensor, rejected: Tensor, pairs: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of an evaluation, of rewards (K, N) and the columns of its N pairs."""
        return {}

    def objective_state(self) -> dict[str, Any]:
        """The objective's state for a checkpoint."""
        return {}

    def load_objective_state(self, state: dict[str, Any]) -> None:
        """Restore what `objective_state` returned."""

    @property
    def first_pass(self) -> bool:
        """Whether this is the first time that the micro-batch is scored."""
        return True

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if dataset_name == "train" and self._train_prepared:
            dataset_name = (
                "eval_train"  # TRL names the parts of an evaluation by their keys, and one may be called "train"
            )
        self._train_prepared = True  # the first of all
        # TRL decides whether rows are chats by any column of these names
        columns = getattr(dataset, "column_names", None) or []
        if unused := [name for name in ("messages", "completion") if name in columns]:
            dataset = dataset.remove_columns(unused)
        # TRL would drop long pairs silently
        max_length, args.max_length = args.max_length, None
        try:
            dataset = super()._prepare_dataset(
                self.judged(dataset, args, dataset_name), processing_class, args, dataset_name
            )
        finally:
            args.max_length = max_length
        fitting = fit_length(dataset, dataset_name, LengthLimit(max_length, self.positions), args.overlong)
        if isinstance(dataset, Dataset):
            self.num_dropped[dataset_name] = len(dataset) - len(fitting)
        return fitting

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += PAIR_COLUMNS

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = self.score(model, {n: x for n, x in inputs.items() if n not in (*PAIR_COLUMNS, "margin")})
        rewards = PairRewards(*outputs.logits.chunk(2))  # (B, K) each
        loss = self.pair_loss(rewards, inputs)
        self._report(rewards, inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _report(self, rewards: PairRewards, inputs: dict[str, Tensor]) -> None:
        if self.mode == "train" and self.first_pass:
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens // getattr(self, "_tp_size", 1)
        if self.mode == "eval":
            columns = {"chosen": rewards.chosen, "rejected": rewards.rejected}
            columns |= {name: inputs[name] for name in ("pair_prob", "pair_votes") if name in inputs}
            # gathered as rows of pairs, so that accelerate drops the rows that the last batch repeats
            everyones = self.accelerator.gather_for_metrics({name: c.contiguous() for name, c in columns.items()})
            self._eval_rows.append({name: column.float().cpu() for name, column in everyones.items()})
        self._metrics[self.mode]["num_tokens"] = [self._total_train_tokens]
        chosen, rejected = rewards.chosen.mean(-1), rewards.rejected.mean(-1)  # (B,)
        both = self.accelerator.gather(torch.stack([chosen, rejected], -1).contiguous())  # (B_global, 2)
        for name, value in (
            ("min_reward", both.min()),
            ("mean_reward", both.mean()),
            ("max_reward", both.max()),
            ("accuracy", (both[:, 0] > both[:, 1]).float().mean()),
            ("margin", (both[:, 0] - both[:, 1]).mean()),
        ):
            self.log_metric(name, value.item())

    # Evaluation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._eval_rows = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._eval_rows:
            pairs = {name: torch.cat([rows[name] for rows in self._eval_rows]) for name in self._eval_rows[0]}
            chosen, rejected = pairs.pop("chosen").T, pairs.pop("rejected").T  # (K, N)
            rewards = torch.cat([chosen.mean(0), rejected.mean(0)])  # (2N,)
            metrics = {
                "min_reward": rewards.min().item(),
                "mean_reward": rewards.mean().item(),
                "max_reward": rewards.max().item(),
                "margin": (chosen - rejected).mean().item(),
            } | self.pair_metrics(chosen, rejected, pairs)
            # these replace TRL's means over batches, in which a small last batch counts like the others
            self._metrics["eval"].update({name: [value] for name, value in metrics.items()})
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self._eval_rows = []
        return output

    # Checkpoints

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            state = {
                "objective": self.objective_state(),
                "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
                "num_tokens": self._total_train_tokens,
            }
            torch.save(state, Path(output_dir) / _STATE)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / _STATE).is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.load_objective_state(state["objective"])
            self._metrics["train"].update(state["metrics"])
            self._total_train_tokens = state["num_tokens"]
