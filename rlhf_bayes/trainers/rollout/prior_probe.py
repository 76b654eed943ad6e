"""Draws a few completions of the prior before training, to say what the posterior asks for."""

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, final

from rich.console import Console
from rich.progress import track
from transformers import TrainerCallback

from rlhf_bayes.trainers.faults.random_state import RandomState
from rlhf_bayes.trainers.rollout.prior_draws import what_is_asked_for

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer


@final
class PriorProbe(TrainerCallback):
    """
    Draws `prior_probe` completions of a few prompts from the prior, and prints what they say of the posterior.

    The training is not influenced: the random state is restored, and the objective does not see these completions. A
    trainer that draws from the prior anyway draws nothing more.

    Args:
        trainer (`RolloutTrainer`):
            The trainer, which scores the completions like its own rollouts.
    """

    def __init__(self, trainer: "RolloutTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if state.global_step > 0 or not args.prior_probe or trainer.beta <= 0:
            return
        if not getattr(args, "prior_samples", 0):
            prompts = args.generation_batch_size // args.num_generations
            rows = list(itertools.islice(trainer.train_dataset, prompts))
            random_state, drawing = RandomState(), trainer.proposal
            # an engine or sharded weights cannot draw from the prior, but the policy is the prior before training
            trainer.proposal = "policy" if self._has_engine else "prior"
            trainer.model.train()
            try:
                draw_in_batches(self._look, rows, args.prior_probe, args, "What does the posterior ask for?")
            finally:
                trainer.proposal = drawing
                random_state.restore()
        draws = trainer.alarms.prior
        if args.process_index == 0 and len(draws):
            text = what_is_asked_for(draws.rewards_of_prompts(), trainer.beta, trainer.evidence is None)
            Console(stderr=True).print(text, highlight=False, markup=False)

    def _look(self, rows: list[dict[str, Any]]) -> None:
        """Draw completions that only the alarms see: the objective does not, and no token is counted."""
        trainer = self.trainer
        tokens, trainer.alarms.alone = trainer.state.num_input_tokens_seen, True
        try:
            trainer.draw(rows)
        finally:
            trainer.state.num_input_tokens_seen, trainer.alarms.alone = tokens, False

    @property
    def _has_engine(self) -> bool:
        trainer = self.trainer
        return trainer.engine.name is not None or trainer.sharded


def draw_in_batches(
    draw: Callable[[list[dict[str, Any]]], None], rows: list[dict[str, Any]], samples: int, args: Any, title: str
) -> None:
    """
    Call `draw` with the part of this process of each batch, until each row has its samples, with a progress bar.

    Args:
        draw (`Callable`):
            Draws one completion for each of the rows that it gets.
        rows (`list[dict]`):
            Rows of the dataset.
        samples (`int`):
            Completions for each row, rounded up to a multiple of `num_generations`.
        args ([`RolloutConfig`]):
            The sizes of a batch.
        title (`str`):
            Of the progress bar.
    """
    per_batch = args.generation_batch_size // args.num_generations  # prompts
    local = args.generation_batch_size // args.world_size
    starts = [start for _ in range(-(-samples // args.num_generations)) for start in range(0, len(rows), per_batch)]
    hidden = args.disable_tqdm or args.process_index > 0
    for start in track(starts, title, disable=hidden):
        draw(list(_batch(rows, start, per_batch, args))[args.process_index * local : (args.process_index + 1) * local])


def _batch(rows: list[dict[str, Any]], start: int, per_batch: int, args: Any) -> Iterator[dict[str, Any]]:
    # the last batch is filled up with the first rows, so that all processes draw the same number
    for index in range(per_batch):
        row = rows[(start + index) % len(rows)]
        yield from (row for _ in range(args.num_generations))
