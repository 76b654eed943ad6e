"""
Contact with transformers' `Trainer`: a checkpoint that meets another number of processes, or another engine.

`PRIVATE_NAMES` lists what is relied on; `tests/trainers/_trl/test_resuming.py` fails by name when a release moves one.
"""

import logging
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

logger = logging.getLogger(__name__)

PRIVATE_NAMES = {"_inner_training_loop": ("batch_size", "args", "resume_from_checkpoint")}


class ResumingTrainer(Trainer):
    """What all trainers here say about a checkpoint before they go on from it. Not for direct use."""

    def _inner_training_loop(self, batch_size=None, args=None, resume_from_checkpoint=None, *others, **kwargs):
        # here the path is known, and DeepSpeed has not read anything yet
        if resume_from_checkpoint is not None:
            check_resumable(resume_from_checkpoint, self.args)
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, *others, **kwargs)


def load_device(device: torch.device) -> str:
    """Where to load tensors to: with several processes, a CPU has an index too, which no loader knows."""
    return "cpu" if device.type == "cpu" else str(device)


def check_resumable(checkpoint: str | Path, args: TrainingArguments) -> None:
    """
    Say what is lost where a checkpoint was written by another number of processes, or on another engine.

    Args:
        checkpoint (`str` or `Path`):
            The folder.
        args ([`~transformers.TrainingArguments`]):
            Of this run.

    Raises:
        `ValueError`: DeepSpeed cannot read it.
    """
    folder, num_processes = Path(checkpoint), args.world_size
    deepspeed = args.deepspeed_plugin is not None
    writers = max(len(list(folder.glob("rng_state_*.pth"))), 1)
    sharded = any(folder.glob("global_step*"))
    if deepspeed and not sharded:
        raise ValueError(
            f"`resume_from_checkpoint` must have been written under DeepSpeed, as this run is, got `{folder}`, which "
            "holds no optimizer state in that form. Resume it without DeepSpeed, or start from its weights: pass the "
            "folder as the model."
        )
    if deepspeed and writers != num_processes:
        raise ValueError(
            f"`resume_from_checkpoint` must come from {num_processes} process{'es' * (num_processes > 1)} under "
            f"DeepSpeed, as many as this run has, got `{folder}` from {writers}: each holds a part of the optimizer "
            f"state. Launch {writers}, or resume without DeepSpeed, where the state starts anew."
        )
    if args.process_index > 0:
        return
    if sharded and not deepspeed:
        logger.warning(
            f"`{folder}` was written under DeepSpeed, and this run is not: the weights go on from there, the state of "
            "the optimizer starts anew."
        )
    if writers != num_processes:
        logger.warning(
            f"`{folder}` was written by {writers} process{'es' * (writers > 1)}, this run has {num_processes}: random "
            "numbers differ from here on. The data go on where they were if per_device_train_batch_size × "
            "gradient_accumulation_steps × processes is what it was."
        )
