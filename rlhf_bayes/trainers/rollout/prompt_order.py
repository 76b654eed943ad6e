"""The order of prompts, the same in a run that was resumed."""

from collections.abc import Iterator

from torch.utils.data import Sampler
from transformers import Trainer


class SamplerByEpoch(Sampler):
    """
    RLOO's sampler, which shuffles by the epoch instead of by how often this process has iterated over it.

    Args:
        sampler (`Sampler`):
            One with `shuffle` and `generator`, TRL's `RepeatSampler`.
        trainer (`Trainer`):
            Whose step tells the epoch.
    """

    def __init__(self, sampler: Sampler, trainer: Trainer):
        self.sampler, self.trainer = sampler, trainer

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            args = self.trainer.args
            steps = len(self) // args.generation_batch_size // args.gradient_accumulation_steps  # an epoch
            self.sampler.generator.manual_seed(args.seed + self.trainer.state.global_step // max(1, steps))
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
