"""
Contact with `RLOOTrainer`: reward functions that fail, and a run that can go on from just before.

A failed reward stops all processes at the same place, between two optimizer steps, and what the run was at the end of
the last one is saved: the checkpoint is the one that would have been saved there.
"""

from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_utils import SaveStrategy

from ..random_state import RandomState
from ..reward_retries import retried
from ..whole_checkpoints import defect
from .checkpoints import CheckpointTrainer


class RewardFaultTrainer(CheckpointTrainer):
    """RLOO that outlives its reward functions' failures. Not for direct use: see [`RolloutTrainer`]."""

    def __init__(self, model, reward_funcs, args, **trl_arguments):
        self._failures: list[Exception] = []
        self._reward_failure: Exception | None = None
        self._step_end: dict[str, Any] = {}
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        funcs = [retried(func, args.reward_timeout, args.reward_retries, self._failures) for func in funcs]
        super().__init__(model, funcs, args, **trl_arguments)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._failures.clear()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._stop_if_failed()
        return rewards

    def _stop_if_failed(self) -> None:
        messages = [f"{type(error).__name__}: {error}" for error in self._failures]
        if self.accelerator.num_processes > 1:
            messages = gather_object(messages)
        if not messages:
            return
        # the processes where nothing failed stop too
        error = self._failures[0] if self._failures else RuntimeError(f"In another process: {messages[0]}")
        self._reward_failure = error
        raise error

    # What a checkpoint between two steps holds

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._keep_step_end()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._keep_step_end()  # logging empties metrics, and an evaluation draws at random

    def _keep_step_end(self) -> None:
        self._step_end = {
            "step": self.state.global_step,
            "random": RandomState(),
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "num_tokens": self.state.num_input_tokens_seen,
        }

    def on_failure(self, error: Exception) -> None:
        super().on_failure(error)
        step = self.state.global_step
        if error is not self._reward_failure or step != self._step_end.get("step"):
            return
        if self.args.save_strategy == SaveStrategy.NO:
            return
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{step}"
        (saved,) = broadcast_object_list([defect(folder) is None])
        if saved:
            return
        # the rollout that failed has drawn at random and counted its tokens
        self._step_end["random"].restore()
        self._metrics["train"].clear()
        self._metrics["train"].update(self._step_end["metrics"])
        self.state.num_input_tokens_seen = self._step_end["num_tokens"]
        try:
            self._save_checkpoint(self.model, trial=None)
        except Exception as second:
            error.add_note("\n".join(["And no checkpoint could be saved:", str(second), *second.__notes__]))
