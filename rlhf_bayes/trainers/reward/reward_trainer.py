"""Trains reward models from pairwise preferences, with ensembles for their uncertainty."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_bayes.lm.critic import active_adapter, kept_trainable
from rlhf_bayes.numerics import bradley_terry_loss
from rlhf_bayes.numerics.bradley_terry import noisy_vote_loss, preference_metrics, smoothed, vote_error_prob
from rlhf_bayes.rewards import JUDGEMENT_COLUMNS, Normalization, RewardEnsemble, RewardIndex, RewardModel
from rlhf_bayes.rewards.folding import write_index
from rlhf_bayes.rewards.lengths import num_positions
from rlhf_bayes.rewards.pairs import read_pairs
from rlhf_bayes.trainers._trl.preference_trainer import PairRewards, PreferenceTrainer
from rlhf_bayes.trainers.faults.resuming import load_device
from rlhf_bayes.trainers.reward.annotators import annotators_of
from rlhf_bayes.trainers.reward.preference_data import PAIR_COLUMNS, PairReader
from rlhf_bayes.trainers.reward.reward_card import TrainedReward, reward_card
from rlhf_bayes.trainers.reward.reward_config import RewardConfig
from rlhf_bayes.trainers.reward.trained_members import (
    add_adapters,
    check_adapter_config,
    check_saved_head,
    config_of,
    widen_head,
)

logger = logging.getLogger(__name__)


class RewardTrainer(PreferenceTrainer):
    r"""
    Trains a reward model, or an ensemble, from pairwise preferences under the Bradley–Terry model.

        P(chosen ≻ rejected) = σ(Δ),   Δ = r(c, chosen) − r(c, rejected) − margin
        loss = −p·log σ(Δ) − (1−p)·log σ(−Δ),   mean over pairs and members

    A drop-in for [`~trl.RewardTrainer`]: same constructor, datasets, flags and metric names; without new options it
    trains the same weights. A row may have further columns:

    - `chosen_prob`: p, the share of people who prefer it, in [0, 1]; or `votes`: counts for chosen, for rejected and
      ties, a list or a dict of these names (p counts a tie as half a vote).
    - `annotator`: the id of the one who judged the row; or `annotators`, a list of ids, with `annotator_votes`, a list
      of "chosen", "rejected" and "tie".
    - `margin`: as in TRL, subtracted from Δ.

    With `num_members` = K > 1, Δ has a column for each member, and a pair counts for a member as often as its
    bootstrap drew it. K heads share a trunk, whose gradient is the mean over members. K LoRA adapters share a frozen
    base and are trained one after the other in each step, so that only the activations of one member are held (under
    DeepSpeed, which needs a single backward pass, those of all). Gradients are clipped by their common norm.

    Evaluation adds the metrics of [`~rlhf_bayes.numerics.preference_metrics`], computed on all pairs at once: log
    loss, Brier score and calibration of P(chosen ≻ rejected), disagreement of the members, and accuracy with its upper
    bound from the votes. They use raw rewards, whose σ(Δ) is the probability that was fitted.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Sequence classifier with one label, or a path; see [`~trl.RewardTrainer`]. `ensemble="heads"` gives it
            `num_members` labels.
        args ([`RewardConfig`], *optional*):
            Configuration.
        data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers:
            As in [`~trl.RewardTrainer`].
        optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config, peft_config:
            As in [`~trl.RewardTrainer`].

    Attributes:
        evaluation_pairs (`dict[str, Tensor]`):
            Raw rewards of the last evaluation: `chosen` (K, N), `rejected` (K, N), and where given `chosen_prob` (N,)
            and `votes` (N, 3).
        annotator_error_rates (`dict[str, float]`):
            With `annotator_reliability`, how often each annotator errs.

    Raises:
        `TypeError` or `ValueError`: if nothing can be learnt from the arguments or data; before the model is loaded.
    """

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        optimizer_cls_and_kwargs=None,
        preprocess_logits_for_metrics=None,
        quantization_config=None,
        peft_config=None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RewardConfig(f"{name.split('/')[-1]}-Reward")
        if not isinstance(args, RewardConfig):
            raise TypeError(
                f"`args` must be a rlhf_bayes.RewardConfig, got {type(args).__module__}.{type(args).__name__}. "
                "Replace the import; every field of TRL's is one of ours."
            )
        if args.num_members > 1 and optimizers[0] is not None:
            raise ValueError(
                f"`optimizers` must be left out with `num_members` = {args.num_members}: members are added to the "
                "model after an optimizer was made for it. Pass `optimizer_cls_and_kwargs`."
            )
        if peft_config is not None:
            check_adapter_config("peft_config", peft_config)
        train_dataset = read_pairs("train_dataset", train_dataset)
        eval_dataset = read_pairs("eval_dataset", eval_dataset)
        self._annotator_ids, self.reliability, self._groups = annotators_of(args, train_dataset)
        quantization = {} if quantization_config is None else {"quantization_config": quantization_config}
        super().__init__(
            model,
            args,
            positions=num_positions(config_of(model, args)),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            **quantization,
        )
        self._adapters: list[str] = self._add_members(args)
        self._training_member: int | None = None
        self.normalization: Normalization | None = None
        self.evaluation_pairs: dict[str, Tensor] = {}

    def _add_members(self, args: RewardConfig) -> list[str]:
        """Give the model its members; returns the names of their adapters, if they are adapters."""
        check_saved_head(self.model)
        if args.ensemble == "lora":
            if args.num_members > 1 and self.is_deepspeed_enabled and args.gradient_checkpointing:
                raise ValueError(
                    "`gradient_checkpointing` must be False with `ensemble='lora'` under DeepSpeed, got True: members "
                    "go through one backward pass, which would run checkpointed layers again under the wrong adapter."
                )
            names = add_adapters(self.model, args.num_members, args.seed)
            return names if args.num_members > 1 else []
        if args.num_members > 1:
            widen_head(self.model, args.num_members, args.seed)
        return []

    # Data

    def judged(self, dataset: Any, args: RewardConfig, name: str) -> Any:
        in_training = name == "train"
        columns = getattr(dataset, "column_names", None) or next(iter(dataset)).keys()
        has_judgement = bool(set(columns) & set(JUDGEMENT_COLUMNS))
        if in_training and has_judgement and args.annotator_agreement is not None:
            raise ValueError(
                f"`annotator_agreement` must be left out where the data say how a pair was judged, got "
                f"{args.annotator_agreement} and {sorted(set(columns) & set(JUDGEMENT_COLUMNS))}: votes hold the "
                "noise already. Set `label_smoothing` to smooth them all the same."
            )
        resampled = in_training and args.num_members > 1 and args.bootstrap == "pairs"
        if "pair_prob" in columns and not in_training:  # prepared by an earlier evaluation
            return dataset
        # columns that another trainer prepared, perhaps with other options
        if others := [column for column in PAIR_COLUMNS if column in columns]:
            dataset = dataset.remove_columns(others)
        if not (has_judgement or resampled):
            return dataset
        annotators = self._annotator_ids if in_training else None
        num_members = args.num_members if resampled else 1
        reader = PairReader(f"{name}_dataset", annotators, num_members, args.seed)
        options = {"desc": f"Reading judgements of {name} dataset"} if isinstance(dataset, Dataset) else {}
        return dataset.map(reader, with_indices=True, **options)

    # Loss

    @property
    def first_pass(self) -> bool:
        return self._training_member in (None, 0)

    def score(self, model, inputs):
        if not self._adapters:
            return super().score(model, inputs)
        members = range(len(self._adapters)) if self._training_member is None else [self._training_member]
        logits = []
        for member in members:
            with active_adapter(self.model, self._adapters[member]):
                logits.append(super().score(model, inputs).logits)
        return SequenceClassifierOutput(logits=torch.cat(logits, -1))  # (2B, K)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.normalization = None  # it was fitted to the weights before training
        if not self._adapters or self.is_deepspeed_enabled:
            loss = super().training_step(model, inputs, num_items_in_batch) / (len(self._adapters) or 1)
        else:
            losses = []
            try:
                for member, name in enumerate(self._adapters):
                    self._training_member = member
                    # the backward pass is inside, since it runs checkpointed layers again with the active adapter
                    with active_adapter(self.model, name):
                        losses.append(super().training_step(model, dict(inputs), num_items_in_batch))
            finally:  # after an interrupted training, an evaluation must score all members
                self._training_member = None
            loss = torch.stack(losses).mean()
        if self.reliability is not None and self.accelerator.sync_gradients:
            self.reliability.step(self.accelerator)
            rates = self.reliability.error_rate
            self.log_metric("annotator_error_mean", rates.mean().item())
            self.log_metric("annotator_error_max", rates.max().item())
        return loss

    def pair_loss(self, rewards: PairRewards, batch: dict[str, Tensor]) -> Tensor:
        delta = rewards.chosen - rewards.rejected  # (B, K)
        if "margin" in batch:
            delta = delta - batch["margin"][:, None]
        if self.mode == "train" and "pair_annotators" in batch:
            losses = self._vote_losses(delta, batch)
        else:
            prob, noise = batch.get("pair_prob"), self.args.label_noise  # (B,)
            if prob is None and noise:
                prob = torch.ones_like(delta[:, 0])
            if prob is not None:
                # the votes of an evaluation contain the annotators' noise already
                of_votes = self.mode == "eval" and self.args.annotator_agreement is not None and "pair_prob" in batch
                prob = smoothed(prob, 0.0 if of_votes else noise)[:, None]
            losses = bradley_terry_loss(delta, prob)  # (B, K)
        if self.mode == "train" and "pair_weights" in batch:
            losses = losses * self._of_members(batch["pair_weights"])
        loss = losses.mean()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * torch.mean((rewards.chosen + rewards.rejected) ** 2)
        if self.mode == "eval" or self.args.num_members == 1 or self._training_member is not None:
            return loss
        disagreement = delta.detach().std(-1, correction=0).mean()
        self.log_metric("disagreement", self.accelerator.reduce(disagreement, reduction="mean").item())
        # adapters share no weights, so the sum of their losses trains each as it would be trained alone
        return loss * (len(self._adapters) or 1)

    def _vote_losses(self, delta: Tensor, batch: dict[str, Tensor]) -> Tensor:  # (B, K) -> (B, K)
        annotators, votes = batch["pair_annotators"], batch["pair_labels"]  # (B, A)
        mask = annotators >= 0  # (B, A)
        rates = torch.zeros_like(votes)
        if self.reliability is not None:
            rates = self.reliability.error_rate[annotators]  # (B, A)
            error_prob = torch.stack([vote_error_prob(d[:, None], votes, rates) for d in delta.detach().T]).mean(0)
            passes = 1 if self._training_member is None else len(self._adapters)
            self.reliability.add(annotators, error_prob, mask, share=1 / passes)
        votes = smoothed(votes, self.args.label_noise)
        losses = torch.stack([noisy_vote_loss(d[:, None], votes, rates) for d in delta.T], -1)  # (B, A, K)
        counts = mask[..., None].float()  # (B, A, 1)
        if self._groups is not None:
            members = torch.arange(self.args.num_members, device=mask.device)
            # times K, so that a vote counts once on average over the members, as without groups
            belongs = self._groups[annotators][..., None] == members  # (B, A, K)
            counts = self._of_members(counts * belongs * self.args.num_members)
        return torch.where(mask[..., None], losses * counts, 0.0).sum(1) / mask.sum(-1, keepdim=True)

    def _of_members(self, columns: Tensor) -> Tensor:
        """The columns of (…, K) for the members that are scored now."""
        return columns if self._training_member is None else columns[..., self._training_member, None]

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if not isinstance(eval_dataset, str):  # a text is the name of a dataset that was read already
            eval_dataset = read_pairs("eval_dataset", eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def pair_metrics(self, chosen: Tensor, rejected: Tensor, pairs: dict[str, Tensor]) -> dict[str, float]:
        self.evaluation_pairs = {"chosen": chosen, "rejected": rejected}
        for name, column in (("chosen_prob", "pair_prob"), ("votes", "pair_votes")):
            if column in pairs:
                self.evaluation_pairs[name] = pairs[column]
        if not chosen.isfinite().all() or not rejected.isfinite().all():
            logger.warning("Rewards are not finite, so an evaluation has no metrics: lower the learning rate.")
            return {}
        if chosen.shape[1] == 1:
            logger.warning("`eval_dataset` has a single pair: its metrics say nothing. Hold out more pairs.")
        return preference_metrics(**self.evaluation_pairs)

    @property
    def annotator_error_rates(self) -> dict[str, float]:
        """How often each annotator errs; empty without `annotator_reliability`."""
        return {} if self.reliability is None else self.reliability.rates()

    # The reward

    @property
    def index(self) -> RewardIndex:
        """The index that is saved with the weights, and says how to read them."""
        num_members = self.args.num_members
        kind = "single" if num_members == 1 else self.args.ensemble
        members = self._adapters or ["model" if num_members == 1 else f"member_{k}" for k in range(num_members)]
        return RewardIndex(kind, list(members), append_eos=True, normalization=self.normalization)

    def reward(self, batch_size: int = 64) -> RewardModel | RewardEnsemble:
        """The reward as trained so far, as a reward function of TRL's protocol. It shares the weights in training."""
        model = self.accelerator.unwrap_model(self.model)
        reward = RewardModel if self.args.num_members == 1 else RewardEnsemble
        return reward(model, self.processing_class, batch_size=batch_size, index=self.index)

    def normalize(self, prompts: list, completions: list, reference: str = "reference completions") -> None:
        """
        Give each member mean 0 and standard deviation 1 on these completions: gain and bias are saved with the model.

        Draw the completions from the prior, so that β is in units of the reward's standard deviation there.
        Completions that the model has no positions for are left out, and a warning reports their number. Save the
        model before, so that an error here loses no training.

        Args:
            prompts (`list` of `str` or of chats): B prompts.
            completions (`list` of `str` or of chats): B completions, in the prompt's form.
            reference (`str`): what the completions are, for the model card.

        Raises:
            `ValueError`: if there are fewer than two completions, or rewards do not vary.
        """
        training = self.model.training
        reward = self.reward()
        reward.normalize(prompts, completions, reference)
        self.normalization = reward.index.normalization
        self.model.train(training)

    # Checkpoints

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if self.is_world_process_zero():
            trained = TrainedReward(
                args=self.args,
                index=self.index,
                base_model=self.model.config._name_or_path or None,
                train_dataset=self.train_dataset,
                num_processes=self.accelerator.num_processes,
                num_dropped=self.num_dropped.get("train", 0),
                evaluation_pairs=self.evaluation_pairs,
                annotator_error_rates=self.annotator_error_rates,
            )
            name = model_name or self.args.hub_model_id or self.args.output_dir
            card = reward_card(trained, name, dataset_name, tags)
            Path(self.args.output_dir, "README.md").write_text(card, encoding="utf-8")

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # ZeRO-3 calls this in every process, and one of them writes the config
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        write_index(folder, self.index)
        if self.reliability is not None:
            (folder / "annotators.json").write_text(json.dumps(self.annotator_error_rates, indent=1) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved, own = RewardIndex.load(resume_from_checkpoint), self.index
        if saved is not None and (saved.kind, saved.members) != (own.kind, own.members):
            raise ValueError(
                f"`resume_from_checkpoint` must hold the ensemble that is trained, {own.num_members} × {own.kind}, "
                f"got {saved.num_members} × {saved.kind} in `{resume_from_checkpoint}`. Set `num_members` and "
                "`ensemble` as they were."
            )
        with kept_trainable(self.model):  # PEFT freezes an adapter that is loaded beside the active one
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        with kept_trainable(self.model):
            super()._load_best_model()
            for name in self._adapters[1:]:  # Trainer restores only the active adapter
                folder = Path(self.state.best_model_checkpoint) / name
                adapter = load_peft_weights(str(folder), device=load_device(self.args.device))
                set_peft_model_state_dict(self.model, adapter, adapter_name=name)

    def objective_state(self) -> dict[str, Any]:
        return {} if self.reliability is None else self.reliability.state_dict()

    def load_objective_state(self, state: dict[str, Any]) -> None:
        if self.reliability is not None:
            self.reliability.load_state_dict(state)
