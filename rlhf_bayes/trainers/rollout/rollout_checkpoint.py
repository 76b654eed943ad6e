"""Saves and reads the parts of a checkpoint besides the policy: the critic, and the rollout in flight."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from trl import RLOOConfig

from rlhf_bayes.lm.critic import CRITIC, detached_critic, set_trainable, split_critic
from rlhf_bayes.lm.forward import base_causal_lm
from rlhf_bayes.rewards.shared import detached_rewards
from rlhf_bayes.trainers.faults.resuming import load_device

logger = logging.getLogger(__name__)

_STATE = "rollout_state_{rank}.pt"
# they say which micro-batch of a rollout comes next, how large it is, and which distribution it came from
_SIZES = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
    "max_completion_length",
    "temperature",
)


@contextmanager
def saved_apart(
    policy: nn.Module, folder: str | Path, state_dict: dict[str, Tensor] | None, writes: bool
) -> Iterator[dict[str, Tensor] | None]:
    """
    A context in which others save the policy without its critic and its reward models.

    At its end the critic is saved beside the policy.

    Args:
        policy (`nn.Module`):
            The unwrapped policy.
        folder (`str` or `Path`):
            The folder of the policy.
        state_dict (`dict[str, Tensor]`, *optional*):
            Whole weights of policy and critic, where an engine gathered them. The policy's are yielded.
        writes (`bool`):
            Whether this process writes.
    """
    critic_state = None
    if state_dict is not None:
        state_dict, critic_state = split_critic(state_dict)
    with detached_critic(base_causal_lm(policy)) as critic, detached_rewards(policy) as adapters:
        if state_dict is not None:
            parts = [f".{adapter}." for adapter in adapters]
            state_dict = {key: w for key, w in state_dict.items() if not any(part in key for part in parts)}
        yield state_dict
    if critic is not None and writes:
        critic.save_pretrained(Path(folder) / CRITIC, critic_state)


@contextmanager
def read_apart(policy: nn.Module, folder: str | Path, device: torch.device) -> Iterator[None]:
    """
    A context in which others read the policy, without its critic, from a folder. At its end the critic is read.

    Args:
        policy (`nn.Module`):
            The unwrapped policy.
        folder (`str` or `Path`):
            A folder that [`saved_apart`] wrote.
        device (`torch.device`):
            The device of this process.
    """
    with detached_critic(base_causal_lm(policy)) as critic:
        yield
    if critic is None:
        return
    critic.load(Path(folder) / CRITIC)
    if critic.adapter is not None:  # Trainer restores only the active adapter from the best checkpoint
        weights = load_peft_weights(str(Path(folder) / CRITIC), device=load_device(device))
        set_peft_model_state_dict(policy, weights, adapter_name=critic.adapter)
    # `load_adapter` freezes every adapter but the active one
    set_trainable(base_causal_lm(policy), critic)


def save_rollout_state(folder: str | Path, accelerator: Accelerator, state: dict[str, Any]) -> None:
    """Write the state of this process, tensors and plain values, next to those of the others."""
    state = state | {"num_processes": accelerator.num_processes}
    torch.save(state, Path(folder) / _STATE.format(rank=accelerator.process_index))


def rollout_sizes(args: RLOOConfig) -> dict[str, int | float]:
    """What a run must have in common with one that goes on in the middle of its rollout, by the name of the flag."""
    return {name: getattr(args, name) for name in _SIZES}


def read_rollout_state(
    folder: str | Path, accelerator: Accelerator, sizes: dict[str, int | float]
) -> tuple[dict[str, Any] | None, bool]:
    """
    This process's state, and whether the run can go on in the middle of its rollout; `None` where there is none.

    A process that is new reads that of the first, which has all that they share.

    Args:
        folder (`str` or `Path`): The checkpoint.
        accelerator (`Accelerator`): Of this run.
        sizes (`dict`): Of this run, as [`rollout_sizes`] gives them.
    """
    paths = [Path(folder) / _STATE.format(rank=rank) for rank in (accelerator.process_index, 0)]
    path = paths[0] if paths[0].is_file() else paths[1]
    if not path.is_file():
        logger.warning(
            f"`{path}` is missing: β and the rollout in flight start anew, so the run will differ from one "
            "that was not interrupted."
        )
        return None, False
    state = torch.load(path, map_location=load_device(accelerator.device), weights_only=True)
    if state["num_processes"] != accelerator.num_processes:
        logger.warning(
            f"The checkpoint was written by {state['num_processes']} processes, this run has "
            f"{accelerator.num_processes}: the rollout in flight is drawn anew."
        )
        return state, False
    # older checkpoints hold no sizes: their rollouts tell how many micro-batches they have
    written = state.get("sizes", {"steps_per_generation": len(state["buffered_inputs"] or [])})
    changed = {name: (size, sizes[name]) for name, size in written.items() if size != sizes[name]}
    if changed and state["buffered_inputs"] is not None:
        differences = ", ".join(f"`{name}` = {old} (now {new})" for name, (old, new) in changed.items())
        logger.warning(f"The checkpoint was written with {differences}: the rollout in flight is drawn anew.")
    return state, not changed
