"""The error rate of each annotator, which is learnt together with the reward."""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_bayes.trainers.reward.preference_data import annotators_in
from rlhf_bayes.trainers.reward.reward_config import RewardConfig


@final
class AnnotatorReliability:
    r"""
    Error rates of annotators, by stochastic expectation–maximisation.

    A vote for chosen has the probability (1−ε_a)·σ(Δ) + ε_a·σ(−Δ) (Chen et al. 2013, "Pairwise ranking aggregation in
    a crowdsourced setting", equation 4, with the annotator's η = 1 − ε). The expected number of errors of each
    annotator under the current reward is summed over a window of one pass through the votes; with the prior Beta(1, 4)
    the rate is

        ε_a = (errors_a + 1) / (votes_a + 5)

    so that the rate of an annotator without votes is one in five.

    Args:
        annotators (`Sequence[str]`):
            Ids of the annotators.
        num_votes (`int`):
            Number of votes in one pass through the data, which is the window.

    Raises:
        `ValueError`: if there are fewer than two annotators: errors of a single one look like a flat reward.
    """

    PRIOR_ERRORS, PRIOR_VOTES = 1.0, 5.0

    def __init__(self, annotators: Sequence[str], num_votes: int, device: torch.device | str = "cpu"):
        if len(annotators) < 2:
            raise ValueError(
                f"`annotator_reliability` needs at least two annotators, got {list(annotators)}: the errors of one "
                "cannot be told from a flat reward. Use `label_smoothing` instead."
            )
        self.annotators = list(annotators)
        self.num_votes = num_votes
        # rows are errors and votes; `_fresh` holds those that are not yet summed over processes
        self._sums = torch.zeros(2, len(annotators), device=device)  # (2, A)
        self._fresh = torch.zeros_like(self._sums)  # (2, A)

    @property
    def error_rate(self) -> Tensor:
        """(A,): probability that a vote is an error."""
        errors, votes = self._sums
        return (errors + self.PRIOR_ERRORS) / (votes + self.PRIOR_VOTES)

    def add(self, annotator_ids: Tensor, error_prob: Tensor, mask: Tensor, share: float = 1.0) -> None:
        """
        Add the votes of a micro-batch.

        Args:
            annotator_ids (`torch.Tensor` of shape `(B, A)`, int): index of the annotator of each vote.
            error_prob (`torch.Tensor` of shape `(B, A)`): probability that the vote was an error.
            mask (`torch.Tensor` of shape `(B, A)`, bool): which entries are votes.
            share (`float`, *optional*, defaults to `1.0`):
                Weight of a vote, below 1 if the vote is added several times, once for each member that is scored
                alone.
        """
        ids = annotator_ids[mask]
        self._fresh[0].index_add_(0, ids, share * error_prob[mask].float())
        self._fresh[1].index_add_(0, ids, torch.full_like(ids, share, dtype=torch.float))

    def step(self, accelerator: Any) -> None:
        """Update the rates with the votes that all processes added since the last optimizer step."""
        fresh = accelerator.reduce(self._fresh, reduction="sum")
        self._sums = self._sums * math.exp(-float(fresh[1].sum()) / self.num_votes) + fresh
        self._fresh = torch.zeros_like(self._fresh)

    def rates(self) -> dict[str, float]:
        """Error rate by annotator."""
        return dict(zip(self.annotators, self.error_rate.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The state between two optimizer steps, for `load_state_dict`."""
        return {"annotators": self.annotators, "sums": self._sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restore what `state_dict` returned.

        Raises:
            `ValueError`: if the annotators differ.
        """
        if state["annotators"] != self.annotators:
            raise ValueError(
                f"A checkpoint must be resumed with the annotators of its data, {len(state['annotators'])} in number; "
                f"got {len(self.annotators)}, or others. Pass the same `train_dataset`."
            )
        self._sums = state["sums"].to(self._sums.device)


def annotators_of(
    args: RewardConfig, dataset: Any
) -> tuple[dict[str, int] | None, AnnotatorReliability | None, Tensor | None]:
    """
    Indices of the annotators, their reliability to learn, and the member of each (A,), as far as asked for.

    Args:
        args ([`RewardConfig`]): The configuration.
        dataset (`Any`): The pairs to train on.

    Raises:
        `ValueError`: if annotators are asked for and the dataset has none, or too few of them.
    """
    dealt_out = args.num_members > 1 and args.bootstrap == "annotators"
    if not args.annotator_reliability and not dealt_out:
        return None, None, None
    asked = "annotator_reliability=True" if args.annotator_reliability else "bootstrap='annotators'"
    columns = dataset.column_names if isinstance(dataset, Dataset) else None
    if columns is None or not {"annotator", "annotator_votes"} & set(columns):
        raise ValueError(
            f"`{asked}` needs a `train_dataset` of known length with the column `annotator`, or `annotators` and "
            f"`annotator_votes`, got {type(dataset).__name__} with {columns}. Add the ids, or leave the option "
            "out."
        )
    names, num_votes = annotators_in(dataset)
    ids = {name: index for index, name in enumerate(names)}
    reliability = AnnotatorReliability(names, num_votes, args.device) if args.annotator_reliability else None
    if not dealt_out:
        return ids, reliability, None
    if len(names) < args.num_members:
        raise ValueError(
            f"`bootstrap='annotators'` needs at least one annotator for each of {args.num_members} members, got "
            f"{len(names)}. Use fewer members, or `bootstrap='pairs'`."
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(args.seed))
    return ids, reliability, order.remainder(args.num_members).to(args.device)
