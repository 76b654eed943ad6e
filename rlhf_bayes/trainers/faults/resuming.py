"""Finds the checkpoint that a run resumes from, and says what is lost with other processes or another engine."""

import logging
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import TrainingArguments

from rlhf_bayes.trainers.faults.whole_checkpoints import checkpoints, defect, is_sealed, whole_checkpoints

logger = logging.getLogger(__name__)


def checkpoint_to_resume(asked: str | bool | None, output_dir: str | Path, num_processes: int) -> str | None:
    """
    The folder that `resume_from_checkpoint` means.

    Args:
        asked (`bool` or `str`, *optional*):
            True: the newest checkpoint in `output_dir` that is whole for all processes. "auto": the same, or None if
            there is none. Otherwise a path. From a flag, True may be the text "true", in any case.
        output_dir (`str` or `Path`):
            The folder in which checkpoints are looked for.
        num_processes (`int`):
            Number of processes, all of which must call this together.

    Raises:
        `ValueError`: if there is no checkpoint, or it was not written to the end.
    """
    if asked is None or asked is False:
        return None
    word = str(asked).lower()
    if word not in ("true", "auto"):
        _check_whole(Path(asked))
        return str(asked)
    whole = whole_checkpoints(Path(output_dir))
    steps = set(whole)
    if num_processes > 1:
        # processes may have disks of their own, but all must start from the same step
        steps = set.intersection(*gather_object([steps]))
    if steps:
        return str(whole[max(steps)])
    if word == "auto":
        return None
    found = [str(folder) for folder in checkpoints(Path(output_dir)).values()]
    raise ValueError(
        f"`resume_from_checkpoint` is True, but `output_dir` ({output_dir}) holds no checkpoint that is known to "
        f"be whole, got {found or 'none at all'}. "
        + ("If another trainer wrote one, give its path." if found else "To start anew where there is none: 'auto'.")
    )


def _check_whole(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` must be True, 'auto' or a folder that exists, got {str(folder)!r}. Correct "
            "the path."
        )
    reason = defect(folder)
    if reason is None:
        return
    if not is_sealed(folder):
        logger.warning(f"`{folder}` may have been cut short: {reason}.")
        return
    raise ValueError(
        f"`resume_from_checkpoint` must be a checkpoint that was written to the end, got `{folder}`, of which "
        f"{reason}. Use an earlier one; True finds it."
    )


def where_to_go_on(output_dir: str | Path, step: int) -> str:
    """A sentence for the error of a run that stopped at a step: the checkpoint to resume from."""
    try:
        whole = whole_checkpoints(Path(output_dir))
    except OSError:
        whole = {}
    if not whole:
        return f"Training stopped at step {step}; there is no checkpoint to resume from."
    return (
        f"Training stopped at step {step}. The last whole checkpoint is `{whole[max(whole)]}`: go on from it with "
        "`resume_from_checkpoint=True`."
    )


def load_device(device: torch.device) -> str:
    """The device to load tensors to: with several processes the CPU is called "cpu:0", which loaders refuse."""
    return "cpu" if device.type == "cpu" else str(device)


def check_resumable(checkpoint: str | Path, args: TrainingArguments) -> None:
    """
    Warn of what is lost where a checkpoint was written by another number of processes, or on another engine.

    Args:
        checkpoint (`str` or `Path`):
            The folder of the checkpoint.
        args ([`~transformers.TrainingArguments`]):
            The arguments of this run.

    Raises:
        `ValueError`: if DeepSpeed cannot read the checkpoint.
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
