"""
Contact with `RLOOTrainer`: checkpoints from which a run goes on in the middle of a rollout, with its critic beside it.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn
from trl import RLOOTrainer

from ...lm import CRITIC, base_causal_lm, detached_critic, set_trainable, split_critic
from ...rewards.shared import detached_rewards
from .fault_tolerance import FaultTolerantTrainer
from .resuming import ResumingTrainer, load_device

logger = logging.getLogger(__name__)

_STATE = "rollout_state_{rank}.pt"


class CheckpointTrainer(FaultTolerantTrainer, ResumingTrainer, RLOOTrainer):
    """RLOO with whole checkpoints. Not for direct use: see [`RolloutTrainer`]."""

    def rollout_state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the objective to continue where it was."""
        return {"beta": self.beta}

    def load_rollout_state(self, state: dict[str, Any]) -> None:
        """Take back what `rollout_state` returned."""
        self.beta = state["beta"]

    @property
    def _plain_policy(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _save(self, output_dir=None, state_dict=None):
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        critic_state = None
        if state_dict is not None:
            state_dict, critic_state = split_critic(state_dict)
        policy = self._plain_policy
        with detached_critic(base_causal_lm(policy)) as critic, detached_rewards(policy) as adapters:
            if state_dict is not None:
                parts = [f".{adapter}." for adapter in adapters]
                state_dict = {key: w for key, w in state_dict.items() if not any(part in key for part in parts)}
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
                weights = load_peft_weights(str(Path(checkpoint) / CRITIC), device=load_device(self.args.device))
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
        paths = [checkpoint / _STATE.format(rank=rank) for rank in (self.accelerator.process_index, 0)]
        path = paths[0] if paths[0].is_file() else paths[1]  # a process that is new takes over what all share
        place = load_device(self.args.device)
        state = torch.load(path, map_location=place, weights_only=True) if path.is_file() else None
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
