"""
Contact with transformers' `Trainer`: runs that are disturbed, and lose nothing.

`FaultTolerantTrainer` stands before TRL's trainers. A checkpoint is sealed when all of it is on the disk, and a run
is resumed from the newest that is; gradients that are not finite are not learnt from; SIGTERM may end a run in good
order.

`PRIVATE_NAMES` lists what is relied on; `tests/trainers/_trl/test_fault_tolerance.py` fails by name when a release
moves one.
"""

import logging
import shutil
from pathlib import Path

from accelerate.utils import DistributedType, gather_object
from transformers import Trainer

from ..interruption import finished_before_signals
from ..step_watch import StepWatch
from ..whole_checkpoints import checkpoints, defect, is_sealed, remove, rotate, seal, whole_checkpoints

logger = logging.getLogger(__name__)

PRIVATE_NAMES = {
    # overridden: called by transformers with these parameters
    "train": ("resume_from_checkpoint",),
    "_save_checkpoint": ("model", "trial"),
    "_run_epoch": ("model", "epoch"),
}
PRIVATE_ATTRIBUTES = ("_get_output_dir",)


class FaultTolerantTrainer(Trainer):
    """What all trainers here do about faults. Not for direct use; `args` must be a [`FaultConfig`]."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*):
                True: from the newest checkpoint in `output_dir` that was written to the end. "auto": the same, or from
                the start where there is none. Otherwise a path.
            *args, **kwargs:
                As in [`~transformers.Trainer.train`].

        Raises:
            ValueError: if there is no checkpoint to resume from, or it was cut short.
            FloatingPointError: after `max_nonfinite_steps` gradients that were not finite.
            SystemExit: with status 0, after SIGTERM, if `save_on_sigterm`.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        watch = StepWatch(self)
        self.add_callback(watch)
        try:
            with watch.listening():
                output = super().train(checkpoint, *args, **kwargs)
            if watch.gave_up:
                raise FloatingPointError(
                    f"The gradients of {watch.skipped_in_a_row} optimizer steps in a row were not finite "
                    f"(`max_nonfinite_steps` = {self.args.max_nonfinite_steps}). Lower the learning rate, look for "
                    "rewards of an extreme size, or use a precision with a larger range."
                )
        except Exception as error:
            self.on_failure(error)
            error.add_note(self._where_to_go_on())
            raise
        finally:
            self.remove_callback(watch)
        if watch.terminated and self.state.global_step < self.state.max_steps:
            logger.warning(f"SIGTERM: saved at step {self.state.global_step}. {self._where_to_go_on()}")
            self.accelerator.end_training()  # a process that leaves while its group is up may abort
            raise SystemExit(0)
        return output

    def on_failure(self, error: Exception) -> None:
        """Called in all processes that an error ends, before it is raised."""

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        if asked is None or asked is False:
            return None
        output_dir = Path(self.args.output_dir)
        word = str(asked).lower()
        if word not in ("true", "auto"):
            self._check_checkpoint(Path(asked))
            return str(asked)
        whole = whole_checkpoints(output_dir)
        steps = set(whole)
        if self.accelerator.num_processes > 1:
            # each sees its own disk, perhaps, and all must start from the same step
            steps = set.intersection(*gather_object([steps]))
        if steps:
            return str(whole[max(steps)])
        if word == "auto":
            return None
        found = [str(folder) for folder in checkpoints(output_dir).values()]
        raise ValueError(
            f"`resume_from_checkpoint` is True, but `output_dir` ({output_dir}) holds no checkpoint that is known to "
            f"be whole, got {found or 'none at all'}. "
            + (
                "If another trainer wrote one, give its path."
                if found
                else "To start anew where there is none: 'auto'."
            )
        )

    def _check_checkpoint(self, folder: Path) -> None:
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

    def _run_epoch(self, *args, **kwargs):
        # Trainer would take one more step, if the checkpoint of a finished run is in the middle of an epoch
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # Checkpoints

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with finished_before_signals():
            self._clear(folder)
            limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go when this is sealed
            try:
                super()._save_checkpoint(model, trial)
            except Exception as error:
                self._withdraw(folder, error)
                raise
            finally:
                self.args.save_total_limit = limit
            if not self._distributed:
                self._seal(folder)
        if self._distributed:
            # outside: a process that waits for one that failed must hear SIGTERM
            self.accelerator.wait_for_everyone()
            with finished_before_signals():
                self._seal(folder)
            self.accelerator.wait_for_everyone()  # all may now say what the last whole one is

    @property
    def _distributed(self) -> bool:
        return self.accelerator.distributed_type != DistributedType.NO

    def _clear(self, folder: Path) -> None:
        # of an earlier run, or one that was cut short: its files would be mixed with the new ones
        if self.args.should_save and folder.exists():
            remove(folder)
        if self._distributed:
            self.accelerator.wait_for_everyone()

    def _seal(self, folder: Path) -> None:
        if not self.args.should_save:
            return
        seal(folder)
        best = self.state.best_model_checkpoint
        keep = [folder, *([Path(best)] if best is not None else [])]
        rotate(folder.parent, self.args.save_total_limit, keep)

    def _withdraw(self, folder: Path, error: Exception) -> None:
        # what was written is of no use, and may be what filled the disk
        free = shutil.disk_usage(folder.parent).free / 1e6
        if self.args.should_save:
            remove(folder)
        error.add_note(
            f"`{folder}` could not be written, with {free:.1f} MB free on the disk. What was written of it is removed."
        )

    def _where_to_go_on(self) -> str:
        try:
            whole = whole_checkpoints(Path(self.args.output_dir))
        except OSError:
            whole = {}
        if not whole:
            return f"Training stopped at step {self.state.global_step}; there is no checkpoint to resume from."
        folder = whole[max(whole)]
        return (
            f"Training stopped at step {self.state.global_step}. The last whole checkpoint is `{folder}`: go on from "
            "it with `resume_from_checkpoint=True`."
        )

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to a metric. Defined by the trainers."""
        raise NotImplementedError(f"{type(self).__name__} must define `log_metric`.")
