"""An order of prompts that is the same in a resumed run."""

from collections.abc import Iterator

from torch.utils.data import Sampler
from transformers import Trainer


class SamplerByEpoch(Sampler):
    """
    RLOO's sampler, seeded by the epoch rather than by how often this process has iterated over it.

    Args:
        sampler (`Sampler`):
            A sampler with `shuffle` and `generator`, such as TRL's `RepeatSampler`.
        trainer (`Trainer`):
            The trainer, whose step gives the epoch.
    """

    def __init__(self, sampler: Sampler, trainer: Trainer):
        self.sampler, self.trainer = sampler, trainer

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            args = self.trainer.args
            steps = (
                len(self) // args.generation_batch_size // args.gradient_accumulation_steps
            )  # optimizer steps per epoch
            self.sampler.generator.manual_seed(args.seed + self.trainer.state.global_step // max(1, steps))
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
