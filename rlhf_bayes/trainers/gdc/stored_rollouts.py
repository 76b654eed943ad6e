"""Rollouts whose completions and scores come from a store: nothing is generated, and no prior or reward is run."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_bayes.likelihoods import Likelihood, known_bound
from rlhf_bayes.lm import score_completions
from rlhf_bayes.lm.language_model import pad_ids
from rlhf_bayes.objectives import Rollout
from rlhf_bayes.objectives.objective import scored
from rlhf_bayes.objectives.stored_normalizers import StoredNormalizers
from rlhf_bayes.store import CompletionStore
from rlhf_bayes.store.stored_draws import StoredDraws
from rlhf_bayes.trainers._trl.engines import graph_kept
from rlhf_bayes.trainers.gdc.gdc_config import GDCConfig
from rlhf_bayes.trainers.rollout.in_flight import RolloutInFlight

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer

logger = logging.getLogger(__name__)


def stored_rewards(**kwargs: Any) -> list[float]:
    """Stands for the reward functions, which RLOO asks for. Their values are in the store."""
    raise RuntimeError("Rewards come from the store, and no completion was drawn that they could be asked for.")


@final
class StoredRollouts:
    """
    Draws of a store in groups of `num_generations` completions of a prompt.

    An epoch is one pass over the store, in which each completion is in at most one group. The groups of a prompt are
    formed anew in each epoch, from the seed and the epoch alone, so that a resumed run has the same.

    Args:
        store ([`CompletionStore`]):
            The completions.
        args ([`GDCConfig`]):
            β, weights and clipping of the rewards, and the size of a group.
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`], *optional*):
            Evidence in nats instead of the stored rewards.

    Attributes:
        dataset (`Dataset`): a row for each group, which takes the place of a dataset of prompts.
        rows_of (`Sequence[Tensor]`): the rows of each prompt, (n,) each.

    Raises:
        ValueError: if the store holds no group, or no rewards and no likelihood is given.
    """

    def __init__(self, store: CompletionStore, args: GDCConfig, likelihood: Likelihood | None = None):
        self.draws, self.args, self.likelihood = StoredDraws.of(store), args, likelihood
        self.rewards, self.features = evidence_of(self.draws, store.reward_names, args, likelihood)
        order = self.draws.prompt_index.argsort(stable=True)
        self.rows_of = order.split(self.draws.prompt_index.bincount().tolist())
        self._epoch, self._orders = -1, {}
        self.dataset = self._groups(store)
        if self.draws.num_mixed or self.draws.num_own:
            logger.info(f"Completions of {store.path} are weighted {self.draws.weighting}.")

    def normalizers(self, beta: float) -> StoredNormalizers:
        """
        log Z of each prompt from all its stored completions.

        Args:
            beta (`float`):
                Units of reward per nat of evidence; 1 for a likelihood.
        """
        draws = self.draws
        bound = None if self.likelihood is None else known_bound(self.likelihood)
        ratios = draws.log_prior - draws.log_proposal
        return StoredNormalizers(draws.prompt_index, ratios, self.rewards.double() / beta, bound)

    def rollout(
        self, trainer: "RolloutTrainer", inputs: Sequence[dict[str, Any]], in_flight: RolloutInFlight
    ) -> Rollout:
        """
        The completions of some groups, scored under the policy alone.

        Args:
            trainer (`RolloutTrainer`):
                Holds the policy.
            inputs (`Sequence[dict]`):
                Rows of `dataset`, each as often as a group has members, as RLOO's sampler repeats them.
            in_flight ([`RolloutInFlight`]):
                The rollout. It keeps the policy's graph where the first step learns by the same forward.
        """
        which = self._rows(trainer, inputs)
        features = {name: values[which] for name, values in self.features.items()}
        keys = self.draws.prompt_index[which]
        return scored_rows(trainer, self.draws, which, keys, self.rewards[which], features, in_flight)

    def _groups(self, store: CompletionStore) -> Dataset:
        size = self.args.num_generations
        counts = [len(rows) // size for rows in self.rows_of]  # groups of each prompt
        few = sum(count == 0 for count in counts)
        if few == len(counts):
            raise ValueError(
                f"`num_generations` must be at most the completions that the store holds of a prompt, "
                f"{max(map(len, self.rows_of))}, got {size}. Lower it, or draw more of each prompt."
            )
        if few:
            logger.warning(
                f"{few} of {len(counts)} prompts of {store.path} have fewer than `num_generations` = {size} "
                "completions and are left out."
            )
        of_group = [index for index, count in enumerate(counts) for _ in range(count)]
        numbers = [number for count in counts for number in range(count)]
        return Dataset.from_dict(
            # the prompts' token ids are in the store; RLOO asks for the column
            {"prompt": ["stored"] * len(of_group), "prompt_index": of_group, "group": numbers}
        )

    def _rows(self, trainer: "RolloutTrainer", inputs: Sequence[dict[str, Any]]) -> Tensor:
        """The rows of the store that these inputs stand for: (B,)."""
        args, size = self.args, self.args.num_generations
        rollouts = max(1, len(self.dataset) // (args.generation_batch_size // size))  # of an epoch
        epoch = trainer.micro_steps // (args.steps_per_generation * args.num_iterations) // rollouts
        first = trainer.accelerator.process_index * len(inputs)  # row in the batch of all processes
        return torch.stack(
            [
                self._order(row["prompt_index"], epoch)[row["group"] * size + (first + number) % size]
                for number, row in enumerate(inputs)
            ]
        )

    def _order(self, prompt: int, epoch: int) -> Tensor:
        """The rows of a prompt in the order of an epoch: (n,)."""
        if epoch != self._epoch:
            self._epoch, self._orders = epoch, {}
        if prompt not in self._orders:
            rows = self.rows_of[prompt]
            self._orders[prompt] = rows[torch.randperm(len(rows), generator=seeded(self.args.seed, epoch, prompt))]
        return self._orders[prompt]


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose draws follow from some integers."""
    # a hash of them, since consecutive seeds would give related orders
    return torch.Generator().manual_seed(hash(numbers) % 2**63)


def evidence_of(
    draws: StoredDraws, reward_names: Sequence[str], args: GDCConfig, likelihood: Likelihood | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    The reward of stored completions, or their evidence in nats, and the features that it comes from, (N,) each.

    Args:
        draws ([`~rlhf_bayes.store.stored_draws.StoredDraws`]): The completions.
        reward_names (`Sequence[str]`): The reward functions of the store.
        args ([`GDCConfig`]): Weights and clipping of the rewards.
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`], *optional*): Evidence in their place.
    """
    if likelihood is not None:
        return draws.evidence(likelihood)
    return draws.rewards(reward_names, args.reward_weights, args.reward_clip_range, args.missing_eos_penalty), {}


def scored_rows(
    trainer: "RolloutTrainer",
    draws: StoredDraws,
    which: Tensor,
    prompt_keys: Tensor,
    rewards: Tensor,
    features: dict[str, Tensor],
    in_flight: RolloutInFlight,
) -> Rollout:
    """
    A rollout of stored completions, scored under the policy alone.

    Args:
        trainer (`RolloutTrainer`): Holds the policy.
        draws ([`~rlhf_bayes.store.stored_draws.StoredDraws`]): Stored completions.
        which, prompt_keys, rewards (`Tensor` (B,)): Their rows that the rollout takes, and of each of these an integer
            that tells its prompt, and its reward.
        features (`dict[str, Tensor]`): Name -> (B,).
        in_flight ([`RolloutInFlight`]): The rollout. It keeps the policy's graph where the first step learns by the
            same forward.
    """
    rows = draws.rows[which.tolist()]
    device = trainer.accelerator.device
    prompt_ids, prompt_mask = pad_ids(rows["prompt_ids"], "left", device)
    completion_ids, mask = pad_ids(rows["completion_ids"], "right", device)
    sequences = (prompt_ids, prompt_mask.long(), completion_ids, mask.long())
    num_tokens = trainer.accelerator.reduce(prompt_mask.sum() + mask.sum(), reduction="sum")
    trainer.state.num_input_tokens_seen += int(num_tokens)
    learns = trainer.step_is_rollout
    with trainer.accelerator.autocast(), torch.no_grad():
        if learns:
            with graph_kept(trainer.model, trainer.args):
                scores = score_completions(trainer.model, *sequences, trainer.temperature)
            in_flight.graph = scores._replace(hidden=None)
        else:
            scores = score_completions(trainer.model, *sequences, trainer.temperature)
    log_probs, entropy = scored(scores)
    of_rows = {"dtype": torch.float32, "device": device}
    return Rollout(
        *sequences,
        prompt_keys=prompt_keys.to(device),
        token_log_probs=log_probs.detach(),
        ref_token_log_probs=draws.log_prior[which, None].to(**of_rows),
        token_entropy=entropy.detach(),
        log_proposal=draws.log_proposal[which].to(**of_rows),
        rewards=rewards.to(**of_rows),
        num_generations=trainer.args.num_generations,
        drawn_from="store",
        features={name: values.to(device) for name, values in features.items()},
    )
