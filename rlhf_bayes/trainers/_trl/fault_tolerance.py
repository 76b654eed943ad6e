"""
Contact with transformers' `Trainer`: protection of a run against faults.

`FaultTolerantTrainer` is the common base of the trainers here that extend TRL's. A checkpoint is sealed when all of it
is on the disk, and a run is resumed from the newest sealed one. Steps whose gradients are not finite are skipped.
SIGTERM may save a checkpoint and end the run.

`PRIVATE_NAMES` lists the names that this relies on; `tests/trainers/_trl/test_fault_tolerance.py` fails by name when a
release moves one.
"""

import logging
import shutil
from pathlib import Path

from accelerate.utils import DistributedType, broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from rlhf_bayes.lm.pretrained import read_renamed_weights
from rlhf_bayes.trainers.faults.interruption import finished_before_signals
from rlhf_bayes.trainers.faults.resuming import check_resumable, checkpoint_to_resume, where_to_go_on
from rlhf_bayes.trainers.faults.step_watch import StepWatch, TerminatedError
from rlhf_bayes.trainers.faults.whole_checkpoints import defect, remove, rotate, seal

logger = logging.getLogger(__name__)

PRIVATE_NAMES = {
    # overridden: called by transformers with these parameters
    "train": ("resume_from_checkpoint",),
    "_inner_training_loop": ("batch_size", "args", "resume_from_checkpoint"),
    "_run_epoch": ("model", "epoch"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
}
PRIVATE_ATTRIBUTES = ("_get_output_dir",)
TRL_ATTRIBUTES = ("_metrics",)


class FaultTolerantTrainer(Trainer):
    """The handling of faults that all trainers here share. Not for direct use; `args` must be a [`FaultConfig`]."""

    watch: StepWatch | None = None
    """Looks at each optimizer step of the training that goes on, or was the last."""

    @property
    def preempted(self) -> bool:
        """Whether SIGTERM ended the training before its last step, to go on later."""
        ended = self.watch is not None and self.watch.terminated
        return ended and self.state.global_step < self.state.max_steps

    @property
    def mode(self) -> str:
        """The key under which TRL keeps metrics: "train" or "eval"."""
        return "train" if self.model.training else "eval"

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to a metric; its mean is logged at the next logging step."""
        self._metrics[self.mode][name].append(float(value))

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
            RuntimeError: after a collapse of the policy, if `stop_on_collapse`.
            SystemExit: with status 0, after SIGTERM, if `save_on_sigterm`.
        """
        output_dir = self.args.output_dir
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, output_dir, self.accelerator.num_processes)
        watch = self.watch = StepWatch(self)
        callbacks = [watch, *self.training_callbacks()]
        for callback in callbacks:
            self.add_callback(callback)
        try:
            with watch.listening():
                output = super().train(checkpoint, *args, **kwargs)
            watch.check_gradients()
            self.check_outcome()
        except TerminatedError as stop:
            self.on_failure(stop)
            if getattr(stop, "__notes__", None):  # it could not be saved
                raise
            output = None
        except Exception as error:
            self.on_failure(error)
            error.add_note(where_to_go_on(output_dir, self.state.global_step))
            raise
        finally:
            for callback in callbacks:
                self.remove_callback(callback)
        if self.preempted:
            step = self.state.global_step
            saved = "saved" if defect(self._checkpoint_folder(None)) is None else "nothing to save"
            logger.warning(f"SIGTERM: {saved} at step {step}. {where_to_go_on(output_dir, step)}")
            self.accelerator.end_training()  # a process that exits before its process group is closed may abort
            raise SystemExit(0)
        return output

    def training_callbacks(self) -> list[TrainerCallback]:
        """Further callbacks for the time of a training."""
        return []

    def check_outcome(self) -> None:
        """Called when a training has ended without an error; raises one if it ended for a reason that is one."""

    def on_failure(self, error: Exception) -> None:
        """Called in every process that ends with an error, before the error is raised."""

    def _inner_training_loop(self, batch_size=None, args=None, resume_from_checkpoint=None, *others, **kwargs):
        # checked here, where the path is known and DeepSpeed has not read anything yet
        if resume_from_checkpoint is not None:
            check_resumable(resume_from_checkpoint, self.args)
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, *others, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # Trainer would take one more step if the checkpoint of a finished run is in the middle of an epoch
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # Checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # which reads a state dict of its own
            read_renamed_weights(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            read_renamed_weights(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)

    def save_after(self, error: Exception) -> None:
        """
        Save a checkpoint in all processes, unless it is there; a failure to do so is noted in `error`.

        After SIGTERM a run saves that otherwise saves none, as between two steps.
        """
        if self.args.save_strategy == SaveStrategy.NO and not isinstance(error, TerminatedError):
            return
        (saved,) = broadcast_object_list([defect(self._checkpoint_folder(None)) is None])
        if saved:
            return
        try:
            self._save_checkpoint(self.model, trial=None)
        except Exception as second:
            error.add_note("\n".join(["And no checkpoint could be saved:", str(second), *second.__notes__]))

    def _checkpoint_folder(self, trial) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model, trial):
        folder = self._checkpoint_folder(trial)
        with finished_before_signals():
            self._clear(folder)
            limit, self.args.save_total_limit = (
                self.args.save_total_limit,
                None,
            )  # older checkpoints are deleted after this one is sealed
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
            # outside of that context, since a process that waits for a failed one must still receive SIGTERM
            self.accelerator.wait_for_everyone()
            with finished_before_signals():
                self._seal(folder)
            self.accelerator.wait_for_everyone()  # now all processes see the same last whole checkpoint

    @property
    def _distributed(self) -> bool:
        return self.accelerator.distributed_type != DistributedType.NO

    def _clear(self, folder: Path) -> None:
        # a folder of an earlier run, or one not written to the end: its files would be mixed with the new ones
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
        # the incomplete checkpoint is of no use, and may be what filled the disk
        free = shutil.disk_usage(folder.parent).free / 1e6
        if self.args.should_save:
            remove(folder)
        error.add_note(
            f"`{folder}` could not be written, with {free:.1f} MB free on the disk. What was written of it is removed."
        )
