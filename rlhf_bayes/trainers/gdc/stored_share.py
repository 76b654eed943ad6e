"""A share of each batch from a store: groups of prompts whose completions are read instead of drawn."""

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, final

import torch

from rlhf_bayes.likelihoods import Likelihood
from rlhf_bayes.objectives import Rollout
from rlhf_bayes.store import CompletionStore
from rlhf_bayes.trainers.gdc.gdc_config import GDCConfig
from rlhf_bayes.trainers.gdc.stored_rollouts import StoredRollouts, scored_rows, seeded
from rlhf_bayes.trainers.rollout.in_flight import RolloutInFlight
from rlhf_bayes.trainers.rollout.scored_rollout import prompt_key
from rlhf_bayes.trainers.rollout.store_writer import provenance_of_trainer

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer

Rows = list[dict[str, Any]]


@final
class StoredShare:
    """
    Replaces a share of the prompts of each rollout by stored completions of the same prompts.

    Which prompts these are, and which of their completions, is drawn anew for each rollout from the seed and the
    number of the rollout alone, so that a resumed run has the same, and so have any number of processes. So each
    completion of the batch is one of the mixture (1 − share)·q + share·q_store, whatever its prompt.

    Args:
        args ([`GDCConfig`]):
            `replay_store` and `store_share`.
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`], *optional*):
            Evidence in nats instead of the stored rewards.
        train_dataset:
            The prompts.

    Attributes:
        from_prior (`bool`): whether the prior alone drew what is stored, so that its density is known everywhere.

    Raises:
        ValueError: if the store has too few completions of a prompt, or was made at another temperature or length.
    """

    def __init__(self, args: GDCConfig, likelihood: Likelihood | None, train_dataset: Any):
        self.args, self.store = args, CompletionStore(str(args.replay_store))
        for name in ("temperature", "max_completion_length"):
            made, asked = getattr(self.store.provenance, name), getattr(args, name)
            if made != asked:
                raise ValueError(
                    f"`{name}` must be that of `replay_store`, {made}, got {asked}: its log-probabilities are those "
                    "of another prior. Set it, or draw anew."
                )
        self.rollouts = StoredRollouts(self.store, args, likelihood)
        draws = self.rollouts.draws
        self.from_prior = draws.names == ["prior"]
        keys = [
            prompt_key({"prompt": prompt} | columns)
            for prompt, columns in zip(draws.prompts, draws.columns, strict=True)
        ]
        self.keys = torch.tensor(keys)  # (P,)
        self._rows_of = dict(zip(keys, self.rollouts.rows_of, strict=True))
        for row in train_dataset:
            found = len(self._rows_of.get(prompt_key(row), ()))
            if found < args.num_generations:
                raise ValueError(
                    f"`replay_store` must hold `num_generations` = {args.num_generations} completions of each row of "
                    f"`train_dataset`, with equal columns, got {found} of {str(row)[:200]}. Draw more of them "
                    "(`rlhf-bayes sample --store`), or leave such rows out."
                )

    def check_made_by(self, trainer: "RolloutTrainer") -> None:
        """
        Refuse a store that was made by another prior, tokenizer or reward than the training is about.

        Raises:
            ValueError: with both values.
        """
        if trainer.sharded or trainer.reads_images or trainer.engine.name is not None:
            what = "sharded weights" if trainer.sharded else trainer.engine.name or "images in prompts"
            raise ValueError(
                f"`replay_store` must be left out with {what}, got {self.args.replay_store!r}: it holds text, which "
                "is scored by a policy whose weights are whole, and weighted by the density of what draws."
            )
        names = [] if trainer.evidence is not None else list(trainer.reward_func_names)
        own = provenance_of_trainer(trainer, names)
        own.check_same(self.store.provenance, "replay_store", self.store.path, rewards=trainer.evidence is None)

    def split(self, trainer: "RolloutTrainer", inputs: Rows) -> tuple[Rows, Rows]:
        """
        The rows for which completions are drawn, and those for which they are read.

        Args:
            trainer (`RolloutTrainer`): Counts the rollouts.
            inputs (`list[dict]`): Rows of this process, in whole groups.
        """
        size = self.args.num_generations
        groups = [inputs[start : start + size] for start in range(0, len(inputs), size)]
        share = Fraction(round(self.args.store_share * len(groups)), len(groups))
        # so many of each block of consecutive groups: no block then crosses from one process to another
        count, block = share.as_integer_ratio()
        first = trainer.accelerator.process_index * len(groups) // block
        read = set()
        for number in range(len(groups) // block):
            chosen = torch.randperm(block, generator=self._generator(trainer, "which", first + number))[:count]
            read |= {number * block + index for index in chosen.tolist()}
        parts = [[row for index, group in enumerate(groups) if (index in read) == which for row in group]
                 for which in (False, True)]  # fmt: skip
        return parts[0], parts[1]

    def rollout(self, trainer: "RolloutTrainer", inputs: Sequence[dict[str, Any]]) -> Rollout:
        """Stored completions of some rows, in whole groups, scored under the policy alone."""
        size = self.args.num_generations
        keys = [prompt_key(row) for row in inputs]
        which, first = [], trainer.accelerator.process_index * (len(inputs) // size)
        for number, key in enumerate(keys[::size], first):
            rows = self._rows_of[key]
            order = torch.randperm(len(rows), generator=self._generator(trainer, "rows", number))
            which.append(rows[order[:size]])
        rows = torch.cat(which)
        features = {name: values[rows] for name, values in self.rollouts.features.items()}
        columns = (torch.tensor(keys), self.rollouts.rewards[rows], features)
        return scored_rows(trainer, self.rollouts.draws, rows, *columns, RolloutInFlight())

    def _generator(self, trainer: "RolloutTrainer", use: Literal["which", "rows"], number: int) -> torch.Generator:
        args = self.args
        rollout = trainer.micro_steps // (args.steps_per_generation * args.num_iterations)
        return seeded(args.seed, rollout, ("which", "rows").index(use), number)


def check_store_share(args: GDCConfig) -> None:
    """
    Refuse a share of stored completions that the batch cannot have, or whose weights are not known.

    Args:
        args ([`GDCConfig`]): The configuration, when the sizes of its batches are set.

    Raises:
        ValueError: with the field, its value, and what to set.
    """
    if args.proposal != "policy":
        raise ValueError(
            f"`proposal` must be 'policy' with `replay_store`, got {args.proposal!r}: the mixture that weighs the "
            "completions is of the policy's draws and the stored ones. Leave it out."
        )
    if args.baseline == "leave_one_out":
        raise ValueError(
            "`baseline` must be 'constant' or 'none' with `replay_store`, got 'leave_one_out': the mean of a "
            "completion's siblings is another for stored ones than for fresh ones, which would bias the gradient of "
            "their mixture. Leave it out."
        )
    rows, size = args.per_device_train_batch_size * args.steps_per_generation, args.num_generations
    groups = rows // size
    if rows % size or groups < 2:
        raise ValueError(
            f"The rollout of a process must hold whole groups with `replay_store`, two or more, got {rows} "
            f"completions with `num_generations` = {size}. Set `per_device_train_batch_size` times "
            "`steps_per_generation` to a multiple of it."
        )
    stored = args.store_share * groups
    if not 0 < round(stored) < groups or abs(stored - round(stored)) > 1e-6:
        raise ValueError(
            f"`store_share` must be a whole number of the {groups} prompts of a process's rollout, neither none nor "
            f"all, got {args.store_share:g}, which is {stored:g}. Set it to {max(1, round(stored))}/{groups} or "
            "another such share; pass the store as `train_dataset` to learn from it alone."
        )
