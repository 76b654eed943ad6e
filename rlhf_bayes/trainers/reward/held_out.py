"""Reward models on pairs that they were not trained on, and on draws of a language model beside a gold reward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from trl import maybe_extract_prompt

from rlhf_bayes.numerics import best_of_n_kl_bound, expected_best_of_n
from rlhf_bayes.numerics.bradley_terry import preference_metrics, votes_to_prob
from rlhf_bayes.numerics.calibration import ReliabilityBins, reliability_bins
from rlhf_bayes.rewards import JUDGEMENT_COLUMNS, RewardEnsemble, RewardModel, check_pairs, read_judgement


@dataclass(frozen=True)
class HeldOutRewards:
    """
    Raw rewards of K members for N pairs, beside what people said of these; as `trainer.evaluation_pairs` has them.

    Raw, because σ(Δ) is a probability of raw rewards only: normalisation multiplies Δ by its gain.
    """

    chosen: Tensor
    """(K, N)."""
    rejected: Tensor
    """(K, N)."""
    chosen_prob: Tensor | None = None
    """(N,), share of the votes for chosen, half of the ties included; 1 where None, unless there are votes."""
    votes: Tensor | None = None
    """(N, 3) for chosen, for rejected, ties."""

    @property
    def metrics(self) -> dict[str, float]:
        """Those of [`~rlhf_bayes.numerics.preference_metrics`]."""
        return preference_metrics(self.chosen, self.rejected, self.chosen_prob, self.votes)

    @property
    def bins(self) -> ReliabilityBins:
        """Calibration of the members' mean probability."""
        return reliability_bins((self.chosen - self.rejected).sigmoid().mean(0), self.target)

    @property
    def target(self) -> Tensor:
        """Share of people who prefer chosen (N,)."""
        if self.chosen_prob is not None:
            return self.chosen_prob
        return torch.ones_like(self.chosen[0]) if self.votes is None else votes_to_prob(self.votes)

    @property
    def without_a_model(self) -> "HeldOutRewards":
        """The same pairs under Δ = 0, which says nothing: the log loss to beat."""
        zeros = torch.zeros_like(self.chosen[:1])
        return HeldOutRewards(zeros, zeros, self.chosen_prob, self.votes)


def raw_member_rewards(reward: RewardModel | RewardEnsemble, prompts: Sequence, completions: Sequence) -> Tensor:
    """Logits of each member, as in training: (K, B), without the stored normalisation."""
    if isinstance(reward, RewardModel):
        return reward.classifier.logits(prompts, completions)[:, :1].T
    return reward.member_logits(prompts, completions)


def held_out_rewards(reward: RewardModel | RewardEnsemble, dataset: Dataset) -> HeldOutRewards:
    """
    Score the pairs of a preference dataset.

    Args:
        reward ([`~rlhf_bayes.rewards.RewardModel`] or [`~rlhf_bayes.rewards.RewardEnsemble`]):
            The model.
        dataset (`Dataset`):
            Pairs as [`~rlhf_bayes.RewardTrainer`] takes them: texts or chats, with or without `prompt`, `votes`, ….

    Raises:
        TypeError or ValueError: if the trainer would refuse the pairs, or they have a `margin`.
    """
    check_pairs("dataset", dataset)
    if "margin" in dataset.column_names:
        raise ValueError(
            "`dataset` must not have the column `margin`, which Δ would be compared with: it belongs to training. "
            "Remove it."
        )
    rows = [maybe_extract_prompt(row) for row in dataset]
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (
        raw_member_rewards(reward, prompts, [row[name] for row in rows]) for name in ("chosen", "rejected")
    )
    if not set(dataset.column_names) & set(JUDGEMENT_COLUMNS):
        return HeldOutRewards(chosen, rejected)
    judgements = [read_judgement(row, f"`dataset` row {index}") for index, row in enumerate(dataset)]
    prob = torch.tensor([judgement.chosen_prob for judgement in judgements])
    votes = [judgement.votes for judgement in judgements]
    return HeldOutRewards(chosen, rejected, prob, None if None in votes else torch.tensor(votes, dtype=torch.float))


class BestOfN(NamedTuple):
    """What the best of n by a proxy is worth; as `plot_overoptimization` takes it."""

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
        proxy (`torch.Tensor`): (P, N), of N draws for each of P prompts.
        gold (`torch.Tensor`): (P, N), of the same draws.
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
