"""
Reward functions and engines that fail, and a run that can be resumed from just before the failure.

A failure stops all processes at the same place, between two optimizer steps. The state of the run at the end of
the last step is then saved: the checkpoint is the one that would have been saved there.
"""

from typing import Any, final

from accelerate.utils import gather_object
from transformers import TrainerState

from rlhf_bayes.trainers.faults.random_state import RandomState
from rlhf_bayes.trainers.faults.reward_retries import retried
from rlhf_bayes.trainers.rollout.rollout_config import RolloutConfig


@final
class RewardFailures:
    """
    The errors of reward functions and of the engine in this process, at which all processes stop.

    Attributes:
        errors (`list[Exception]`): of the current rollout.
        raised (`Exception`, *optional*): the one that stopped this process.
    """

    def __init__(self):
        self.errors: list[Exception] = []
        self.raised: Exception | None = None

    def kept_from(self, reward_funcs: Any, args: RolloutConfig) -> list:
        """The reward functions as [`retried`]: called again where they fail, with the last error put in `errors`."""
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        return [retried(func, args.reward_timeout, args.reward_retries, self.errors) for func in funcs]

    def stop_all(self, num_processes: int) -> None:
        """
        Raise an error in all processes if a reward function or the engine failed in one of them.

        Args:
            num_processes (`int`):
                Number of processes, all of which must call this together.
        """
        messages = [f"{type(error).__name__}: {error}" for error in self.errors]
        if num_processes > 1:
            messages = gather_object(messages)
        if not messages:
            return
        # the processes in which nothing failed stop too
        self.raised = self.errors[0] if self.errors else RuntimeError(f"In another process: {messages[0]}")
        raise self.raised


@final
class StepEnd:
    """
    The state at the end of an optimizer step that belongs into a checkpoint and that the next rollout changes.

    Args:
        state ([`~transformers.TrainerState`]):
            The state of the run.
        metrics (`dict[str, list[float]]`):
            Metrics that are not logged yet.
    """

    def __init__(self, state: TrainerState, metrics: dict[str, list[float]]):
        self.step = state.global_step
        self._random = RandomState()
        self._unlogged = {name: list(values) for name, values in metrics.items()}
        self._num_tokens = state.num_input_tokens_seen

    def restore(self, state: TrainerState, metrics: dict[str, list[float]]) -> None:
        """Set state, metrics and the random number generators back to what they were at the end of the step."""
        self._random.restore()
        metrics.clear()
        metrics.update(self._unlogged)
        state.num_input_tokens_seen = self._num_tokens
