"""
Contact with `RLOOTrainer`: a trainer that generates and scores as `RLOOTrainer` does, and keeps what it saw.

`RLOOTrainer` prepares data, generates and calls the reward functions; per-token log-probabilities and raw rewards stay
local to its `_generate_and_score_completions`. `RolloutTrainer` keeps them in a [`Rollout`], gives the two hooks that
an objective needs (`rollout_batch`, `rollout_loss`), and adds what RLOO lacks: a reference copied from the weights as
passed, exact KLs, means over the global token count, and a resume that continues in the middle of a rollout.

`PRIVATE_NAMES` lists what is relied on; `tests/trainers/_trl/test_rollouts.py` fails by name when a TRL release moves
one.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl import RLOOTrainer
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from ...lm import (
    CRITIC,
    CompletionScores,
    LMHead,
    base_causal_lm,
    check_prompt_fits,
    detached_critic,
    enable_completion_scoring,
    kept_trainable,
    raw_generation_config,
    scatter,
    score_completions,
    set_trainable,
    split_critic,
    token_log_probs_and_exact_kl,
)
from ..checks import check_tokenizer
from ..interruption import finished_before_signals
from ..reference import Reference
from ..sampler import SamplerByEpoch

PRIVATE_NAMES = {
    # overridden: called by RLOO with these parameters
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields"),
    "_generate_and_score_completions": ("inputs",),
    "_prepare_inputs": ("generation_batch",),
    "_compute_loss": ("model", "inputs"),
    "_get_train_sampler": ("dataset",),
    "_save_checkpoint": ("model", "trial"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}
PRIVATE_ATTRIBUTES = ("_step", "_buffered_inputs", "_metrics", "_tokenizer", "aux_loss_enabled", "beta")

logger = logging.getLogger(__name__)

_STATE = "rollout_state_{rank}.pt"


@dataclass(frozen=True)
class Rollout:
    """
    One process's completions as they were drawn and scored, before anything is learnt from them.

    Log-probabilities are those of the policy and of the prior at the training temperature, in nats; padding is 0.
    """

    mask: Tensor
    """(B, T) bool: completion tokens, the first EOS included."""
    ended: Tensor
    """(B,) bool: whether EOS was drawn."""
    token_log_probs: Tensor
    """(B, T): log π(x_t | prefix) under the policy that drew it."""
    ref_token_log_probs: Tensor
    """(B, T): log π0(x_t | prefix)."""
    token_entropy: Tensor
    """(B, T): entropy of π(· | prefix)."""
    token_kl: Tensor | None
    """(B, T): exact KL(π(· | prefix) ‖ π0(· | prefix)); None where the weights are sharded."""
    values: Tensor | None
    """(B, T): the critic's value of each prefix, where the policy has a critic."""
    rewards_per_func: Tensor
    """(B, F): what each reward function returned; nan for None."""
    num_generations: int
    """Completions a prompt; rows of a prompt are neighbours in the batch of all processes."""


class RolloutTrainer(RLOOTrainer):
    """RLOO's rollouts for other objectives. Not for direct use: see [`PPOTrainer`]."""

    def __init__(self, model, reward_funcs, args, *, ref_model=None, **trl_arguments):
        # RLOO reloads the reference from the hub path, which forgets what was done to an instance: with β = 0 it loads
        # none, and we keep a copy of the weights as passed
        beta, args.beta = args.beta, 0.0
        try:
            super().__init__(model, reward_funcs, args, **trl_arguments)
        finally:
            args.beta = beta
        self.beta = beta
        check_tokenizer(self._tokenizer)
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                f"`processing_class` must be a tokenizer, got {type(self.processing_class).__name__}: "
                f"{type(self).__name__} trains text models only. Pass the processor's `.tokenizer` for text-only data."
            )
        if self.aux_loss_enabled:
            raise ValueError(
                f"`router_aux_loss_coef` must be 0, got {self.router_aux_loss_coef}: {type(self).__name__} has no "
                "load-balancing term, which would move the optimum off the posterior. Set `router_aux_loss_coef=0.0`."
            )
        self.reference = Reference.of(self.model, ref_model, loaded_from=model if isinstance(model, str) else None)
        enable_completion_scoring(self.model)
        if self.reference.module is not None:
            self.reference.module = self._prepare_frozen(self.reference.module)
        self.ref_model = self.reference.module
        if self.use_vllm:
            self._send_policy_without_critic()
        self._scored: dict[str, Tensor] | None = None
        self._rewards_per_func: Tensor | None = None
        self._ended: Tensor | None = None

    # Hooks

    def rollout_batch(self, rollout: Rollout) -> dict[str, Tensor]:
        """Tensors (B, …) or () to add to the batch; rows are shuffled and split along. Defined by the objective."""
        raise NotImplementedError(f"{type(self).__name__} must define `rollout_batch`.")

    def rollout_loss(self, scores: CompletionScores, batch: dict[str, Tensor]) -> Tensor:
        """Sum over this micro-batch's tokens of the loss per token: (). Defined by the objective."""
        raise NotImplementedError(f"{type(self).__name__} must define `rollout_loss`.")

    def rollout_state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the objective to continue where it was."""
        return {"beta": self.beta}

    def load_rollout_state(self, state: dict[str, Any]) -> None:
        """Take back what `rollout_state` returned."""
        self.beta = state["beta"]

    @property
    def mode(self) -> str:
        """ "train" or "eval": where metrics go."""
        return "train" if self.model.training else "eval"

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to a metric; its mean is logged at the next logging step."""
        self._metrics[self.mode][name].append(float(value))

    # Rollouts

    def _get_train_sampler(self, dataset=None):
        # a resumed run must meet the prompts in the order of one that was not interrupted
        return SamplerByEpoch(super()._get_train_sampler(dataset), self)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        for row, ids in enumerate(prompt_ids):
            check_prompt_fits(base_causal_lm(self._plain_policy), len(ids), self.max_completion_length, row)
        with raw_generation_config(self._plain_policy):
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **unused
    ):
        # RLOO asks for the policy first, then, if β > 0, for the reference: both are scored at the first call, so that
        # the exact KL costs no pass of its own
        if self._scored is None:
            self._scored = self._score_under_both(input_ids, attention_mask, logits_to_keep, batch_size)
            return self._scored["token_log_probs"], None, None
        return self._scored["ref_token_log_probs"], None, None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (B_global, F)
        for column, (func, name) in enumerate(zip(self.reward_funcs, self.reward_func_names, strict=True)):
            if isinstance(func, nn.Module) and not rewards[:, column].isfinite().all():
                raise ValueError(
                    f"Reward model `{name}` must return finite rewards, got {rewards[:, column].tolist()}. Its "
                    "weights or its precision are broken; try it in float32 on the completions above."
                )
        first = self.accelerator.process_index * len(prompts)
        self._rewards_per_func = rewards[first : first + len(prompts)]
        eos = set(getattr(self, "eos_token_ids", [self._tokenizer.eos_token_id]))
        self._ended = torch.tensor([ids[-1] in eos for ids in completion_ids_list], device=rewards.device)
        return rewards

    def _generate_and_score_completions(self, inputs):
        self._scored = None
        # both the reference pass and RLOO switch adapters, which would leave the critic's frozen
        with kept_trainable(self.model):
            output = super()._generate_and_score_completions(inputs)
        rollout = Rollout(
            mask=output["completion_mask"].bool(),
            ended=self._ended,
            rewards_per_func=self._rewards_per_func,
            num_generations=self.num_generations if self.mode == "train" else self.num_generations_eval,
            **self._scored,
        )
        self._scored = None
        return output | self.rollout_batch(rollout)

    def _score_under_both(self, input_ids, attention_mask, length, batch_size) -> dict[str, Tensor]:
        prompt_ids, completion_ids = input_ids[:, :-length], input_ids[:, -length:]
        prompt_mask, mask = attention_mask[:, :-length], attention_mask[:, -length:].bool()
        batch_size = batch_size or len(input_ids)
        parts = []
        for start in range(0, len(input_ids), batch_size):
            part = slice(start, start + batch_size)
            parts.append(self._score_rows(prompt_ids[part], prompt_mask[part], completion_ids[part], mask[part]))
        return {
            name: None if parts[0][name] is None else torch.cat([part[name] for part in parts]) for name in parts[0]
        }

    @torch.no_grad()
    def _score_rows(self, prompt_ids, prompt_mask, completion_ids, mask) -> dict[str, Tensor | None]:
        # a head that is sharded, or that PEFT switches with the adapter, can be used inside its own forward only
        sharded = self.accelerator.distributed_type == DistributedType.FSDP or self._zero3
        switched = hasattr(base_causal_lm(self._plain_policy).get_output_embeddings(), "original_module")
        separate = not sharded and not switched
        sequences = (prompt_ids, prompt_mask, completion_ids, mask, self.temperature)
        with self.accelerator.autocast():
            policy = score_completions(self.model, *sequences, hidden_only=separate)
            with self.reference.active(self.model) as ref_model:
                ref = score_completions(ref_model, *sequences, hidden_only=separate, with_values=False)
            if not separate:
                token_log_probs, ref_token_log_probs = policy.log_probs, ref.log_probs
                token_entropy, token_kl = policy.entropy, None
            else:
                columns = token_log_probs_and_exact_kl(
                    policy.hidden,
                    LMHead.of(base_causal_lm(self._plain_policy), self.temperature),
                    ref.hidden,
                    LMHead.of(base_causal_lm(self.accelerator.unwrap_model(ref_model)), self.temperature),
                    completion_ids[mask],
                )
                token_log_probs, ref_token_log_probs, token_entropy, token_kl = (scatter(c, mask) for c in columns)
        return {
            "token_log_probs": token_log_probs,
            "ref_token_log_probs": ref_token_log_probs,
            "token_entropy": token_entropy,
            "token_kl": token_kl,
            "values": policy.values,
        }

    # Loss

    def _prepare_inputs(self, generation_batch):
        generated = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.mode == "train" and self._buffered_inputs is not generated:
            self._count_tokens()
        return inputs

    def _count_tokens(self) -> None:
        # the mean of an optimizer step runs over its tokens in all micro-batches and on all processes
        accumulation = self.args.gradient_accumulation_steps
        local = torch.stack([batch["loss_mask"].sum() for batch in self._buffered_inputs])  # (steps_per_generation,)
        tokens = self.accelerator.reduce(local.float(), reduction="sum").view(-1, accumulation).sum(-1)
        for index, batch in enumerate(self._buffered_inputs):
            batch["tokens_in_step"] = tokens[index // accumulation].clamp(min=1.0)

    def _compute_loss(self, model, inputs):
        if self.mode == "eval":
            # a rollout's own scores say all there is to say: no second forward
            return self.rollout_loss(None, inputs) / inputs["loss_mask"].sum().clamp(min=1)
        scores = score_completions(
            model,
            inputs["prompt_ids"],
            inputs["prompt_mask"],
            inputs["completion_ids"],
            inputs["completion_mask"],
            self.temperature,
        )
        loss = self.rollout_loss(scores, inputs) / inputs["tokens_in_step"]
        # Trainer divides by the accumulation steps, and DDP, FSDP and DeepSpeed average over processes
        return loss * (self.current_gradient_accumulation_steps * self.accelerator.num_processes)

    # Checkpoints

    def _save_checkpoint(self, model, trial):
        with finished_before_signals():
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        critic_state = None
        if state_dict is not None:
            state_dict, critic_state = split_critic(state_dict)
        with detached_critic(base_causal_lm(self._plain_policy)) as critic:
            super()._save(output_dir, state_dict)
        if critic is not None and self.args.should_save:
            critic.save_pretrained(Path(output_dir) / CRITIC, critic_state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:  # one state dict, critic included
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with detached_critic(base_causal_lm(self._plain_policy)) as critic:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_critic(critic, resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        with detached_critic(base_causal_lm(self._plain_policy)) as critic:
            super()._load_best_model()
        self._load_critic(critic, self.state.best_model_checkpoint)

    def _load_critic(self, critic, checkpoint) -> None:
        if critic is not None:
            critic.load(Path(checkpoint) / CRITIC)
            if critic.adapter is not None:  # Trainer takes only the active adapter back from the best checkpoint
                weights = load_peft_weights(str(Path(checkpoint) / CRITIC), device=str(self.args.device))
                set_peft_model_state_dict(self._plain_policy, weights, adapter_name=critic.adapter)
            # `load_adapter` freezes every adapter but the active one
            set_trainable(base_causal_lm(self._plain_policy), critic)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        state = {
            "num_processes": self.accelerator.num_processes,
            "step": self._step,
            "buffered_inputs": self._buffered_inputs,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "objective": self.rollout_state(),
        }
        torch.save(state, Path(output_dir) / _STATE.format(rank=self.accelerator.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_rollout_state(Path(checkpoint))

    def _load_rollout_state(self, checkpoint: Path) -> None:
        # without the file, or with another number of processes, the rollout in flight is lost and drawn anew
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._buffered_inputs = None
        path = checkpoint / _STATE.format(rank=self.accelerator.process_index)
        state = torch.load(path, map_location=self.args.device, weights_only=True) if path.is_file() else None
        if state is None:
            logger.warning(
                f"`{path}` is missing: β and the rollout in flight start anew, so the run will differ from one "
                "that was not interrupted."
            )
            return
        self.load_rollout_state(state["objective"])
        if state["num_processes"] != self.accelerator.num_processes:
            logger.warning(
                f"The checkpoint was written by {state['num_processes']} processes, this run has "
                f"{self.accelerator.num_processes}: the rollout in flight is drawn anew."
            )
            return
        self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
        for name, values in state["metrics"].items():
            self._metrics["train"][name] = values

    # Engines

    @property
    def _plain_policy(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _zero3(self) -> bool:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return plugin is not None and plugin.zero_stage == 3

    def _prepare_frozen(self, module: nn.Module) -> nn.Module:
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(module, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(module, self.accelerator)
        return self.accelerator.prepare_model(module, evaluation_mode=True)

    def _send_policy_without_critic(self) -> None:
        # TRL sends every named parameter, and vLLM has no place for a value head
        sync_weights = self.vllm_generation.sync_weights

        def sync_policy():
            with detached_critic(base_causal_lm(self._plain_policy)):
                sync_weights()

        self.vllm_generation.sync_weights = sync_policy
