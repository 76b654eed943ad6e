"""Fields of all trainers' configurations that say what happens when something goes wrong."""

from dataclasses import dataclass, field

from rlhf_bayes.trainers.field_help import document_fields


@document_fields
@dataclass
class FaultConfig:
    """What a trainer does when something goes wrong. Not for direct use."""

    max_nonfinite_steps: int = field(
        default=3,
        metadata={
            "help": (
                "An optimizer step whose gradient is not finite is skipped. After this many such steps in a row, "
                "training saves a checkpoint and stops."
            )
        },
    )
    save_on_sigterm: bool = field(
        default=False,
        metadata={
            "help": (
                "What SIGTERM does, which schedulers send before they kill a job. True: the optimizer step ends, a "
                "checkpoint is saved, and the process exits with status 0; where the training waits for actors, it is "
                "that of the step before. False: the process ends at once, or after the checkpoint that is being "
                "written."
            )
        },
    )

    def _check_faults(self) -> None:
        count = self.max_nonfinite_steps
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"`max_nonfinite_steps` must be at least 1 (optimizer steps), got {count!r}. To stop at the first, "
                "use 1."
            )
