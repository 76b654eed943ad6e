"""What the configurations of all trainers say about runs that are disturbed."""

from dataclasses import dataclass, field


@dataclass
class FaultConfig:
    r"""
    What a trainer does when something goes wrong. Not for direct use.

    Parameters:
        max_nonfinite_steps (`int`, *optional*, defaults to `3`):
            An optimizer step whose gradient is not finite is skipped. After so many in a row training saves a
            checkpoint and stops.
        save_on_sigterm (`bool`, *optional*, defaults to `False`):
            Whether SIGTERM, with which schedulers announce that they will kill a job, lets the optimizer step end,
            saves a checkpoint, and ends the process with status 0. Otherwise it ends the process at once, or after the
            checkpoint that is being written.
    """

    max_nonfinite_steps: int = field(
        default=3,
        metadata={
            "help": "Optimizer steps in a row with a gradient that is not finite: each is skipped; after so many "
            "training saves a checkpoint and stops."
        },
    )
    save_on_sigterm: bool = field(
        default=False,
        metadata={"help": "Whether SIGTERM saves a checkpoint after the current step and exits with status 0."},
    )

    def _check_faults(self) -> None:
        count = self.max_nonfinite_steps
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"`max_nonfinite_steps` must be at least 1 (optimizer steps), got {count!r}. To stop at the first, "
                "use 1."
            )
