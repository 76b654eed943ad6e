"""Evaluates reward models on held-out pairs, and on draws of a language model against a gold reward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_bayes.numerics import best_of_n_kl_bound, expected_best_of_n
from rlhf_bayes.numerics.bradley_terry import preference_metrics, votes_to_prob
from rlhf_bayes.numerics.calibration import ReliabilityBins, reliability_bins
from rlhf_bayes.rewards import JUDGEMENT_COLUMNS, RewardEnsemble, RewardModel, read_judgement
from rlhf_bayes.rewards.lengths import OVERLONG, LengthLimit, overlong_rows
from rlhf_bayes.rewards.pairs import prompt_and_texts, read_pairs
from rlhf_bayes.rewards.text_classifier import too_long_for


@dataclass(frozen=True)
class HeldOutRewards:
    """
    Raw rewards of K members for N pairs, and the judgements of these pairs; as in `trainer.evaluation_pairs`.

    They are raw since σ(Δ) is a probability only for raw rewards: normalisation multiplies Δ by a gain.
    """

    chosen: Tensor
    """(K, N)."""
    rejected: Tensor
    """(K, N)."""
    chosen_prob: Tensor | None = None
    """(N,): share of the votes for chosen, where a tie is half a vote. None: the share of `votes`, or else 1."""
    votes: Tensor | None = None
    """(N, 3): votes for chosen, votes for rejected, ties."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the pairs, from [`~rlhf_bayes.numerics.preference_metrics`]."""
        return preference_metrics(self.chosen, self.rejected, self.chosen_prob, self.votes)

    @property
    def bins(self) -> ReliabilityBins:
        """Calibration of the members' mean probability."""
        return reliability_bins((self.chosen - self.rejected).sigmoid().mean(0), self.target)

    @property
    def target(self) -> Tensor:
        """(N,): the share of people who prefer chosen."""
        if self.chosen_prob is not None:
            return self.chosen_prob
        return torch.ones_like(self.chosen[0]) if self.votes is None else votes_to_prob(self.votes)

    @property
    def without_a_model(self) -> "HeldOutRewards":
        """The same pairs with Δ = 0, for the metrics of an uninformative model."""
        zeros = torch.zeros_like(self.chosen[:1])
        return HeldOutRewards(zeros, zeros, self.chosen_prob, self.votes)


def raw_member_rewards(
    reward: RewardModel | RewardEnsemble, prompts: Sequence, completions: Sequence, max_length: int | None = None
) -> Tensor:
    """
    Logits of each member, as in training: (K, B), without the stored normalisation.

    Args:
        reward ([`RewardModel`] or [`RewardEnsemble`]):
            The model.
        prompts, completions (`Sequence` of `str` or of chats):
            B prompts and completions.
        max_length (`int`, *optional*):
            Of longer texts only the last `max_length` tokens are read.
    """
    if isinstance(reward, RewardModel):
        return reward.classifier.logits(prompts, completions, max_length)[:, :1].T
    return reward.member_logits(prompts, completions, max_length)


def held_out_rewards(
    reward: RewardModel | RewardEnsemble, dataset: Dataset, max_length: int | None = None, overlong: str = "error"
) -> HeldOutRewards:
    """
    Score the pairs of a preference dataset, each text as the trainer reads it.

    Args:
        reward ([`~rlhf_bayes.rewards.RewardModel`] or [`~rlhf_bayes.rewards.RewardEnsemble`]):
            The model.
        dataset (`Dataset`):
            Pairs as [`~rlhf_bayes.RewardTrainer`] takes them: texts or chats, with or without `prompt`, `votes`, ….
        max_length (`int`, *optional*):
            Longest text, in tokens. The model's number of positions is an upper limit.
        overlong (`str`, *optional*, defaults to `"error"`):
            What happens to pairs with a longer text: `"drop"`, `"truncate"` from the left, or `"error"`.

    Raises:
        TypeError or ValueError: if the trainer would refuse the pairs, or they have a `margin`, `tools` or
            `chat_template_kwargs`.
    """
    dataset = pairs_that_fit([reward], dataset, max_length, overlong)
    rows = [prompt_and_texts(row) for row in dataset]  # pyright: ignore[reportArgumentType]
    prompts, *sides = zip(*rows, strict=True)
    chosen, rejected = (_rewards_of(reward, prompts, side, max_length, overlong) for side in sides)
    if not set(dataset.column_names) & set(JUDGEMENT_COLUMNS):
        return HeldOutRewards(chosen, rejected)
    judgements = [read_judgement(row, f"`dataset` row {index}") for index, row in enumerate(dataset)]
    prob = torch.tensor([judgement.chosen_prob for judgement in judgements])
    votes = [judgement.votes for judgement in judgements]
    return HeldOutRewards(chosen, rejected, prob, None if None in votes else torch.tensor(votes, dtype=torch.float))


def pairs_that_fit(
    rewards: Sequence[RewardModel | RewardEnsemble], dataset: Dataset, max_length: int | None, overlong: str
) -> Dataset:
    """
    The pairs of a preference dataset whose texts are short enough for all of several models.

    So the models can be compared on the same pairs; with `overlong="truncate"` these are all pairs.

    Args:
        rewards (`Sequence` of [`RewardModel`] or [`RewardEnsemble`]):
            The models.
        dataset, max_length, overlong:
            As in [`held_out_rewards`].
    """
    if overlong not in OVERLONG:
        raise ValueError(f"`overlong` must be one of {OVERLONG}, got {overlong!r}. Choose one of them.")
    dataset = read_pairs("dataset", dataset)
    if "margin" in dataset.column_names:
        raise ValueError(
            "`dataset` must not have the column `margin`, which Δ would be compared with: it belongs to training. "
            "Remove it."
        )
    for column in ("tools", "chat_template_kwargs"):
        if column in dataset.column_names:
            raise ValueError(
                f"`dataset` must not have the column `{column}`: the trainer passes it to the chat template, and a "
                "reward model that is scored does not, so the texts would differ. Put it into the messages."
            )
    rows = [prompt_and_texts(row) for row in dataset]  # pyright: ignore[reportArgumentType]
    prompts, *sides = zip(*rows, strict=True)
    classifiers = [classifier for reward in rewards for classifier in reward.classifiers]
    too_long = sorted({row for side in sides for row in too_long_for(classifiers, prompts, side, max_length)})
    positions = [classifier.positions for classifier in classifiers if classifier.positions is not None]
    limit = LengthLimit(max_length, min(positions, default=None))
    overlong_rows("pairs in `dataset`", too_long, len(dataset), limit, overlong)
    if overlong == "truncate":
        return dataset
    dropped = set(too_long)
    return dataset.select([row for row in range(len(dataset)) if row not in dropped]) if dropped else dataset


def _rewards_of(
    reward: RewardModel | RewardEnsemble, prompts: Sequence, texts: Sequence, max_length: int | None, overlong: str
) -> Tensor:
    if overlong != "truncate":
        return raw_member_rewards(reward, prompts, texts)
    positions = [classifier.positions for classifier in reward.classifiers if classifier.positions is not None]
    limit = LengthLimit(max_length, min(positions, default=None))
    return raw_member_rewards(reward, prompts, texts, limit.tokens)


class BestOfN(NamedTuple):
    """Rewards of the best of n by a proxy, as `plot_overoptimization` takes them."""

    root_kl: list[float]
    """√ of the bound on KL(best of n‖prior), √nats, for each n."""
    proxy: list[float]
    """Mean proxy reward of the best of n, in standard deviations under the prior."""
    gold: list[float]
    """Mean gold reward of the best of n by the proxy, in standard deviations under the prior."""


def best_of_n(proxy: Tensor, gold: Tensor, ns: Sequence[int]) -> BestOfN:
    """
    Proxy and gold reward of the best of n by the proxy, each with mean 0 and standard deviation 1 over the draws.

    Args:
        proxy (`torch.Tensor`): (P, N), proxy rewards of N draws for each of P prompts.
        gold (`torch.Tensor`): (P, N), gold rewards of the same draws.
        ns (`Sequence[int]`): sizes n, each from 1 to N.

    Raises:
        ValueError: as [`~rlhf_bayes.numerics.expected_best_of_n`], or if a reward is the same for all draws.
    """
    curves = []
    for name, scores in (("proxy", proxy), ("gold", gold)):
        spread = scores.std(correction=0)
        if not spread > 0:
            raise ValueError(
                f"`{name}` must vary between the draws, got {scores.flatten()[0].item():.4g} for all of them. Pass "
                "another reward, or prompts that it applies to."
            )
        curves.append(expected_best_of_n(proxy, (scores - scores.mean()) / spread, ns).tolist())
    return BestOfN([math.sqrt(best_of_n_kl_bound(n)) for n in ns], *curves)
