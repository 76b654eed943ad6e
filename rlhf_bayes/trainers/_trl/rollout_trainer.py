"""
Contact with `RLOOTrainer`: a trainer that generates and scores like `RLOOTrainer`, and keeps the results.

`RLOOTrainer` prepares data, generates and calls the reward functions; per-token log-probabilities and raw rewards stay
local to its `_generate_and_score_completions`. `RolloutTrainer` keeps them in a [`Rollout`], which an
[`~rlhf_bayes.objectives.Objective`] turns into a batch and a loss. It adds what RLOO lacks: a reference copied from
the initial weights, exact KLs, means over the global token count, and resuming in the middle of a rollout.

`PRIVATE_NAMES` lists the names that this relies on; `tests/trainers/_trl/test_rollout_trainer.py` fails by name when a
TRL release moves one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_bayes.likelihoods import combine_rewards
from rlhf_bayes.lm import enable_completion_scoring, score_completions
from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.critic import kept_trainable
from rlhf_bayes.lm.forward import CompletionScores, runs_plainly
from rlhf_bayes.lm.generation import draw_plainly, raw_generation_config, remove_dropout
from rlhf_bayes.lm.language_model import check_prompt_fits
from rlhf_bayes.lm.padding_free import enable_packing
from rlhf_bayes.lm.probe import evaluating
from rlhf_bayes.objectives import Batch, Objective, Rollout
from rlhf_bayes.objectives.batch import by_length
from rlhf_bayes.objectives.proposal import Snapshot
from rlhf_bayes.rewards.prefix_rewards import prefix_rewards
from rlhf_bayes.trainers._trl.engine_draws import EngineDraws
from rlhf_bayes.trainers._trl.engines import (
    as_returned_by,
    is_sharded,
    learns_from_earlier_forward,
    plain,
    prepare_frozen,
    without_critic,
)
from rlhf_bayes.trainers._trl.fault_tolerance import FaultTolerantTrainer
from rlhf_bayes.trainers._trl.image_prompts import ImagePromptRLOO, probe_with_image
from rlhf_bayes.trainers._trl.loaded_policy import policy_to_train
from rlhf_bayes.trainers._trl.rollout_scorer import RolloutScorer, images_are_read
from rlhf_bayes.trainers.faults.reward_failures import RewardFailures, StepEnd
from rlhf_bayes.trainers.faults.step_watch import TerminatedError
from rlhf_bayes.trainers.rollout.alarms import Alarms
from rlhf_bayes.trainers.rollout.checks import check_plain_passes, check_tokenizer
from rlhf_bayes.trainers.rollout.evidence import unusable_rewards
from rlhf_bayes.trainers.rollout.images import check_packs_text, check_processor
from rlhf_bayes.trainers.rollout.in_flight import OptimizerStep, RolloutInFlight
from rlhf_bayes.trainers.rollout.prior_checks import check_adapters, check_not_moved, probe_if_whole
from rlhf_bayes.trainers.rollout.prior_probe import PriorProbe
from rlhf_bayes.trainers.rollout.prompt_order import SamplerByEpoch
from rlhf_bayes.trainers.rollout.reference import Reference
from rlhf_bayes.trainers.rollout.reward_funcs import LikelihoodReward
from rlhf_bayes.trainers.rollout.rollout_checkpoint import (
    read_apart,
    read_rollout_state,
    rollout_sizes,
    save_rollout_state,
    saved_apart,
)
from rlhf_bayes.trainers.rollout.scored_rollout import prompt_key, scored_by_length
from rlhf_bayes.trainers.rollout.shared_rewards import share_base
from rlhf_bayes.trainers.rollout.step_size import StepSize
from rlhf_bayes.trainers.rollout.store_writer import StoreWriter
from rlhf_bayes.trainers.rollout.write_card import write_card

if TYPE_CHECKING:
    from rlhf_bayes.trainers.gdc.actor_rollouts import ActorRollouts
    from rlhf_bayes.trainers.gdc.stored_rollouts import StoredRollouts

PRIVATE_NAMES = {
    # overridden: called by RLOO with these parameters
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields"),
    "_generate_and_score_completions": ("inputs",),
    "_prepare_inputs": ("generation_batch",),
    "_compute_loss": ("model", "inputs"),
    "_get_train_sampler": ("dataset",),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}
PRIVATE_ATTRIBUTES = ("_step", "_buffered_inputs", "_metrics", "_tokenizer", "beta")


class RolloutTrainer(FaultTolerantTrainer, ImagePromptRLOO):
    """RLOO's rollouts for other objectives. Not for direct use: see [`PPOTrainer`]."""

    objective: Objective
    """The objective that a step minimises. Subclasses create it at the end of their constructor."""
    evidence: LikelihoodReward | None = None
    """The evidence, if it is a likelihood rather than a reward."""
    stored: "StoredRollouts | ActorRollouts | None" = None
    """The rollouts of a store, where completions and their scores come from one."""
    asked_for_prefixes: Mapping[int, Callable] = {}
    """Number of a reward function -> what is called for the rewards of prefixes: see [`functions_of_prefixes`]."""

    def __init__(self, model, reward_funcs, args, *, ref_model=None, quantization_config=None, **trl_arguments):
        # RLOO would reload the reference from the model's path, without changes that were made to an instance. With
        # β = 0 it loads none, and a copy of the given weights is made here.
        beta, args.beta = args.beta, 0.0
        peft_config = trl_arguments.get("peft_config")
        check_adapters(model, peft_config)
        check_packs_text(args.padding_free, trl_arguments.get("processing_class"))
        self._failures, self._step_end = RewardFailures(), None
        self.own_optimizer = trl_arguments.get("optimizers", (None, None))[0] is not None
        try:
            with policy_to_train(model, args, trl_arguments, quantization_config) as (model, reload):
                probe_with_image(model, trl_arguments.get("processing_class"))
                passed = probe_if_whole(model) if peft_config is not None or hasattr(model, "peft_config") else None
                # the oldest supported TRL creates adapters with random weights before it sets the seed
                set_seed(args.seed)
                super().__init__(model, self._failures.kept_from(reward_funcs, args), args, **trl_arguments)
        finally:
            args.beta = beta
        self.beta = beta
        check_tokenizer(self._tokenizer)
        enable_completion_scoring(self.model)
        datasets = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        check_processor(self.processing_class, self.model, self.use_vllm, **datasets)
        check_packs_text(args.padding_free, self.processing_class)
        self.engine = EngineDraws(self)
        check_plain_passes(self.model, self.accelerator.num_processes, self.engine.name is not None)
        if peft_config is None:
            check_not_moved(self.model, passed, "the trainer made its reference adapter")
        self.reference = (
            Reference(None) if self.stored is not None else Reference.of(self.model, ref_model, reload, passed)
        )
        self.exclude_image_token(self.model, self.reference.module)
        if args.padding_free:
            for module in filter(None, (self.model, self.reference.module)):
                enable_packing(module)
        remove_dropout(self.model)
        if self.reference.module is not None:
            self.reference.module = prepare_frozen(self.reference.module, self.accelerator)
        self.ref_model = self.reference.module
        if self.use_vllm:
            self.vllm_generation.sync_weights = without_critic(self.vllm_generation.sync_weights, self._plain_policy)
        self.proposal: str | Snapshot = "policy" if self.stored is None else "store"
        """What completions are drawn from in training: "policy", "prior", a snapshot of the policy, or a store."""
        self.store_writer = None if args.store is None else StoreWriter(self, args.store)
        self.alarms, self.step_size = Alarms(self), StepSize(self)
        self._in_flight: RolloutInFlight | None = None
        self._step_in_progress: OptimizerStep | None = None
        self._images_checked = False
        share_base(self.reward_funcs, lambda: self.model)

    @property
    def reward_failures(self) -> RewardFailures:
        """The errors of reward functions in this process."""
        return self._failures

    # The objective

    @property
    def adds_stored(self) -> bool:
        """Whether `extended` adds stored completions to the batches of the policy's."""
        return False

    def rows_to_draw(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of a rollout for which completions are drawn: all, unless others are added to the batch."""
        return inputs

    def extended(self, batch: Batch) -> Batch:
        """The batch of a rollout with what is added to it."""
        return batch

    def after_rollout(self) -> None:
        """Called after the objective has made its batch of a rollout."""

    def rollout_state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        writer = {} if self.store_writer is None else {"store": self.store_writer.state_dict()}
        return self.objective.state_dict() | writer

    def load_rollout_state(self, state: dict[str, Any]) -> None:
        """Restore what `rollout_state` returned."""
        self.objective.load_state_dict(state)
        if self.store_writer is not None and "store" in state:  # checkpoints of earlier versions have none
            self.store_writer.load_state_dict(state["store"])
        self.beta = self.objective.beta

    def draw(self, rows: list[dict[str, Any]]) -> None:
        """Draw and score one completion for each of these rows, without learning from them or logging."""
        metrics, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        self._generate_and_score_completions(rows)
        self._metrics["train"], self._in_flight = metrics, None

    def training_callbacks(self) -> list[TrainerCallback]:
        """The learning rate, the alarms, which read how far steps move, and the probe of the prior."""
        return [self.step_size, self.alarms, PriorProbe(self)]

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if self.is_world_process_zero():
            write_card(self, model_name, dataset_name, tags)

    def check_outcome(self) -> None:
        """Raise the error of a training that ended because its policy collapsed."""
        self.alarms.check()

    # Rollouts

    def _get_train_sampler(self, dataset=None):
        # a resumed run must see the prompts in the order of an uninterrupted one
        return SamplerByEpoch(super()._get_train_sampler(dataset), self)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        policy = base_causal_lm(self._plain_policy)
        for row, ids in enumerate(prompt_ids):
            check_prompt_fits(policy, len(ids), self.max_completion_length, row)
        if self.is_fsdp_enabled:
            # this mark makes `generate` go on until the last process has its completions. transformers sets it on
            # models that it shards itself, but accelerate does not set it for FSDP2.
            policy._is_fsdp_managed_module = True
        with self.drawing() as module, raw_generation_config(plain(module, self.accelerator)):
            if runs_plainly(module):
                with self.accelerator.autocast(), evaluating(module):
                    return draw_plainly(
                        module, prompt_ids, self.max_completion_length, self._eos_ids, self.temperature
                    )
            wrapped, self.model_wrapped = self.model_wrapped, module
            draw = super()._generate_single_turn
            try:
                return self.engine.draw(prompt_ids, lambda: draw(prompt_ids, images, multimodal_fields))
            finally:
                self.model_wrapped = wrapped

    @contextmanager
    def drawing(self) -> Iterator[nn.Module]:
        """A context that yields the module from which completions are drawn."""
        if self.mode == "eval" or self.proposal == "policy":
            yield self.model_wrapped
        elif isinstance(self.proposal, Snapshot):
            with self.proposal.active(self._plain_policy):
                yield self.model_wrapped
        else:
            with self.reference.active(self.model) as module:
                yield module

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **unused
    ):
        # RLOO scores the policy first and then, if β > 0, the reference. Both are scored at the first call here, so
        # that the exact KL needs no pass of its own.
        rollout = self._in_flight
        if rollout.scored is not None:
            return rollout.scored["ref_token_log_probs"], None, None
        prompt_ids, completion_ids = input_ids.split((input_ids.size(1) - logits_to_keep, logits_to_keep), dim=1)
        prompt_mask, mask = attention_mask.bool().split((prompt_ids.size(1), logits_to_keep), dim=1)
        sequences = (prompt_ids, prompt_mask, completion_ids, mask)
        rollout.scored = scored_by_length(
            RolloutScorer(self, rollout), sequences, batch_size or len(input_ids), self.model_inputs
        )
        if rollout.engine_log_probs is not None:
            rollout.scored["log_proposal"] = rollout.engine_log_probs
        self._images_checked = self._images_checked or images_are_read(self, sequences)
        return rollout.scored["token_log_probs"], None, None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._failures.errors.clear()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (B_global, F)
        self._failures.errors += unusable_rewards(
            rewards, self.reward_funcs, self.reward_func_names, self.args.infinite_where_forbidden
        )
        self._in_flight.prefix_rewards = self._prefix_rewards(self.data_rows, prompts, completion_ids_list)
        self._failures.stop_all(self.accelerator.num_processes)
        first = self.accelerator.process_index * len(prompts)
        self._in_flight.rewards_per_func = rewards[first : first + len(prompts)]
        # RLOO logs means of rewards, which leave out nan: forbidden completions must not make them −inf
        rewards = torch.where(rewards == -torch.inf, torch.nan, rewards)
        eos = set(self._eos_ids)
        ended = torch.tensor([ids[-1] in eos for ids in completion_ids_list])
        self._in_flight.ended = ended.to(rewards.device, non_blocking=True)
        return rewards

    def _prefix_rewards(self, inputs, prompts, completion_ids) -> Tensor | None:
        if not self.asked_for_prefixes:
            return None
        numbers, funcs = list(self.asked_for_prefixes), list(self.asked_for_prefixes.values())
        rewards = prefix_rewards(funcs, self._tokenizer, inputs, prompts, completion_ids).to(self.accelerator.device)
        weights, clip_range = self.reward_weights[numbers], self.args.reward_clip_range
        combined = combine_rewards(rewards.flatten(0, 1), weights, clip_range).view(rewards.shape[:2])  # (B, T)
        return torch.where(combined.isfinite(), combined, 0.0)

    @property
    def step_is_rollout(self) -> bool:
        """
        Whether the first step after a rollout learns from all of it at once, and from nothing else.

        Then the forward that scores the rollout serves the step too, if the engine can go backward through it. A
        rollout of several micro-batches is scored without gradient, since their graphs would lie in memory at once.
        """
        whole = self.args.steps_per_generation == 1 and not (self.objective.replays or self.alarms.alone)
        return (
            learns_from_earlier_forward(self.accelerator)
            and whole
            and not self.adds_stored
            and self.proposal in ("policy", "store")
        )

    def _generate_and_score_completions(self, inputs):
        in_flight = self._in_flight = RolloutInFlight()
        inputs = self.rows_to_draw(inputs)
        if self.stored is not None:
            output, rollout = {}, self.stored.rollout(self, inputs, in_flight)
        else:
            # the reference pass and RLOO switch adapters, which would leave the critic's adapter frozen
            with kept_trainable(self.model):
                output = super()._generate_and_score_completions(inputs)
            rollout = self._rollout(inputs, output, in_flight)
        if self.mode == "train" and self.store_writer is not None:
            self.store_writer.write(rollout, inputs, in_flight)
        self.engine.report(rollout)
        if self.mode == "train":
            self.alarms.see(rollout)
            if self.alarms.alone:
                return output
        drawn = self.objective.batch(rollout)
        self.beta = self.objective.beta
        self.after_rollout()
        batch = self.extended(drawn)
        # RLOO's own columns have no rows for completions that were added, and are not read
        columns = (output if batch is drawn else {}) | batch.columns()
        if in_flight.graph is not None:
            columns["row"] = torch.arange(len(batch), device=batch.completion_mask.device)
        return columns

    def _rollout(self, inputs: list[dict[str, Any]], output: dict[str, Tensor], in_flight: RolloutInFlight) -> Rollout:
        rewards = combine_rewards(
            in_flight.rewards_per_func,
            self.reward_weights,
            self.args.reward_clip_range,
            self.args.missing_eos_penalty,
            in_flight.ended,
        )  # (B,), nan where no reward function applies
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        keys = torch.tensor([prompt_key(row) for row in inputs])
        return Rollout(
            **{name: output[name] for name in names},
            **in_flight.scored,
            model_inputs=self.model_inputs,
            prompt_keys=keys.to(rewards.device, non_blocking=True),
            rewards=rewards,
            num_generations=self.num_generations if self.mode == "train" else self.num_generations_eval,
            prefix_rewards=in_flight.prefix_rewards,
            drawn_from=self.drawn_from,
            features={} if self.evidence is None else self.evidence.features,
        )

    @property
    def drawn_from(self) -> str:
        """What draws the completions now: "policy", "engine", "prior" or "snapshot"."""
        if self._in_flight is not None and self._in_flight.engine_log_probs is not None:
            return "engine"
        if self.mode == "eval":
            return "policy"
        return self.proposal if isinstance(self.proposal, str) else "snapshot"

    @property
    def micro_steps(self) -> int:
        """The number of micro-batches learnt from so far, which a resumed run goes on counting."""
        return self._step

    # Loss

    def _prepare_inputs(self, generation_batch):
        generated = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        in_flight, self._in_flight = self._in_flight, None
        if self.mode == "eval":
            return self.objective.batch_type.from_columns(inputs)
        index = self._step % self.args.gradient_accumulation_steps
        if index == 0:
            new_rollout = None if self._buffered_inputs is generated else in_flight
            self._step_in_progress = self._next_step(new_rollout)
            self.step_size.begin(self._step_in_progress)
        return self._step_in_progress.batches[index]

    def _next_step(self, new_rollout: RolloutInFlight | None) -> OptimizerStep:
        first = self._step % self.args.steps_per_generation
        micro_batches = self._buffered_inputs[first : first + self.args.gradient_accumulation_steps]
        graph = None if new_rollout is None else new_rollout.graph
        if graph is not None:
            rows = micro_batches[0].pop("row")  # RLOO has shuffled them
            graph = CompletionScores(*(x if x is None else x[rows] for x in graph))
        batch_type = self.objective.batch_type
        step = self.objective.step(
            by_length([batch_type.from_columns(batch) for batch in micro_batches]),
            None if new_rollout is None else [batch_type.from_columns(batch) for batch in self._buffered_inputs],
        )
        # the mean of an optimizer step is over the tokens of all its micro-batches and processes
        count = torch.stack([self.objective.count(batch).float() for batch in step.batches]).sum()
        count = self.accelerator.reduce(count, reduction="sum").clamp(min=1.0)
        return OptimizerStep(list(step.batches), step.skipped, count, graph)

    def _compute_loss(self, model, inputs):
        if self.mode == "eval":
            loss, sums = self.objective.evaluation_loss(inputs)
            totals = torch.stack([loss, self.objective.count(inputs).float()])
            self._report(sums)
            loss, count = self.accelerator.reduce(
                totals, reduction="sum"
            )  # the totals that a single process would have
            return loss / count.clamp(min=1)
        step = self._step_in_progress
        scores, step.graph = step.graph, None
        scores = self.score(model, inputs) if scores is None else as_returned_by(model, scores)
        loss, sums = self.objective.loss(scores, inputs)
        step.add(sums)
        if self.accelerator.sync_gradients:
            self._report(step.sums)
        loss = loss * (0.0 if step.skipped else 1.0) / step.count
        # multiplied, since Trainer divides by the accumulation steps, and DDP, FSDP and DeepSpeed average over
        # processes
        return loss * (self.current_gradient_accumulation_steps * self.accelerator.num_processes)

    def _report(self, sums: dict[str, Tensor]) -> None:
        if sums:
            totals = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
            self.objective.report(dict(zip(sums, totals.tolist(), strict=True)))

    @property
    def step_is_skipped(self) -> bool:
        """Whether the current optimizer step must not change any weight."""
        return self._step_in_progress is not None and self._step_in_progress.skipped

    def score(self, model: nn.Module, batch: Batch) -> CompletionScores:
        """Score the batch's completions under a model, with gradient where that is enabled."""
        return score_completions(model, *batch.sequences, self.temperature, model_inputs=batch.model_inputs)

    @property
    def _eos_ids(self) -> list[int]:
        return getattr(self, "eos_token_ids", [self._tokenizer.eos_token_id])  # the oldest releases know one only

    # Checkpoints

    @property
    def _plain_policy(self) -> nn.Module:
        return plain(self.model, self.accelerator)

    def _save(self, output_dir=None, state_dict=None):
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        with saved_apart(self._plain_policy, output_dir, state_dict, self.args.should_save) as policy_state:
            super()._save(output_dir, policy_state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        whole = self.is_fsdp_enabled  # FSDP gathers one state dict, which includes the critic
        with nullcontext() if whole else read_apart(self._plain_policy, resume_from_checkpoint, self.args.device):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        whole, best = self.is_fsdp_enabled or self.is_deepspeed_enabled, self.state.best_model_checkpoint
        with nullcontext() if whole else read_apart(self._plain_policy, best, self.args.device):
            super()._load_best_model()

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        state = {
            "step": self._step,
            "buffered_inputs": self._buffered_inputs,
            "sizes": rollout_sizes(self.args),
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "objective": self.rollout_state(),
            "alarms": self.alarms.state_dict(),
            "step_size": self.step_size.state_dict(),
        }
        save_rollout_state(output_dir, self.accelerator, state)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._buffered_inputs = None  # if the checkpoint does not hold the rollout in flight, it is drawn again
        state, in_flight = read_rollout_state(checkpoint, self.accelerator, rollout_sizes(self.args))
        if state is not None:
            self.load_rollout_state(state["objective"])
            for name in ("alarms", "step_size"):
                if name in state:  # checkpoints of earlier versions have none
                    getattr(self, name).load_state_dict(state[name])
        if in_flight:
            self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
            self._metrics["train"].update(state["metrics"])

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._step_end = StepEnd(self.state, self._metrics["train"])
        super()._maybe_log_save_evaluate(*args, **kwargs)
        # taken after logging, which empties metrics, and after an evaluation, which changes the random state
        self._step_end = StepEnd(self.state, self._metrics["train"])

    def on_failure(self, error: Exception) -> None:
        between_steps = self._step_end is not None and self._step_end.step == self.state.global_step
        nothing_learnt = error is self._failures.raised or isinstance(error, TerminatedError)
        if nothing_learnt and between_steps:
            # the failed rollout has changed the random state and the count of tokens
            self._step_end.restore(self.state, self._metrics["train"])
            self.save_after(error)

    # Engines

    @property
    def sharded(self) -> bool:
        """Whether no process holds all the weights."""
        return is_sharded(self.accelerator)
