"""What a training loop asks of an objective."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from rlhf_bayes.lm import CompletionScores
from rlhf_bayes.objectives.batch import Batch
from rlhf_bayes.objectives.rollout import Rollout

B = TypeVar("B", bound=Batch)


class LossSums(NamedTuple):
    """Sums over the tokens or completions of a batch."""

    loss: Tensor
    """(), with gradient: divide it by the count of the whole optimizer step, over all batches and processes."""
    sums: dict[str, Tensor]
    """Name -> (), without gradient: added up over an optimizer step, they go to `Objective.report`."""


def scored(scores: CompletionScores) -> tuple[Tensor, Tensor]:
    """
    Log-probs and entropies of the tokens of a batch, (B, T) each, nats.

    Raises:
        ValueError: if the forward was asked for hidden states in their place.
    """
    if scores.log_probs is None or scores.entropy is None:
        raise ValueError("`scores` must hold log-probs and entropies, got None: score without `hidden_only`.")
    return scores.log_probs, scores.entropy


@dataclass(frozen=True)
class Step(Generic[B]):
    """What an optimizer step learns from."""

    batches: Sequence[B]
    """The micro-batches of this process, whose gradients are added up."""
    skipped: bool = False
    """Whether the step says too little to be taken: then no weight may move, not even by momentum or weight decay."""


class Objective(Protocol[B]):
    """
    What a gradient step minimises, apart from who draws, scores, and takes the step.

    `examples/plain_loop.py` is a loop around it; [`PPOTrainer`] and [`GDCTrainer`] are others.

    Attributes:
        beta (`float`): units of reward per nat of evidence, as it is now.
        batch_type (`type`): the dataclass that `batch` returns.
        replays (`bool`): whether a step learns from other completions than those of the last rollout.
    """

    beta: float
    batch_type: type[B]
    replays: bool

    def batch(self, rollout: Rollout) -> B:
        """What is to be learnt from a rollout. It is logged, and remembered where the objective has a memory."""
        ...

    def step(self, batches: Sequence[B], new_rollout: Sequence[B] | None) -> Step[B]:
        """
        What the next optimizer step learns from.

        Args:
            batches (`Sequence[Batch]`):
                Its share of the last rollout, as micro-batches.
            new_rollout (`Sequence[Batch]`, *optional*):
                All micro-batches of the rollout, at its first step.
        """
        ...

    def count(self, batch: B) -> Tensor:
        """How many tokens or completions `loss` sums over: ()."""
        ...

    def loss(self, scores: CompletionScores, batch: B) -> LossSums:
        """The loss of a batch that the policy has scored with gradient."""
        ...

    def evaluation_loss(self, batch: B) -> LossSums:
        """The loss of the policy that drew the batch, from what the rollout says of it."""
        ...

    def report(self, totals: dict[str, float]) -> None:
        """Log what `loss` summed up over an optimizer step, all batches and processes together."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the objective to continue where it was: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        ...
