"""The protocol of objectives, for training loops."""

from collections.abc import Callable, Sequence
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
    """Name -> (), without gradient. The sums of an optimizer step are passed to `Objective.report`."""


def scored(scores: CompletionScores, policy_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """
    Log-probs and entropies of the tokens of a batch, (B, T) each, nats, 0 where its `policy_mask` is 0.

    Raises:
        ValueError: if the forward was asked for hidden states in their place.
    """
    scores = scores.within(policy_mask)
    if scores.log_probs is None or scores.entropy is None:
        raise ValueError("`scores` must hold log-probs and entropies, got None: score without `hidden_only`.")
    return scores.log_probs, scores.entropy


@dataclass(frozen=True)
class Step(Generic[B]):
    """The batches that an optimizer step learns from."""

    batches: Sequence[B]
    """The micro-batches of this process, whose gradients are summed."""
    skipped: bool = False
    """Whether the step must not be taken: then no weight may change, not even by momentum or weight decay."""


class Objective(Protocol[B]):
    """
    What a gradient step minimises. A training loop draws and scores completions, and takes the step.

    `examples/plain_loop.py` is such a loop; [`PPOTrainer`] and [`GDCTrainer`] are others.

    Attributes:
        beta (`float`): the current β, units of reward per nat of evidence.
        batch_type (`type`): the dataclass that `batch` returns.
        replays (`bool`): whether a step learns from other completions than those of the last rollout.
        states (`Callable`, *optional*): what a rollout must keep of the policy's last hidden states: (N, H) -> (N, S).
    """

    beta: float
    batch_type: type[B]
    replays: bool

    @property
    def states(self) -> Callable[[Tensor], Tensor] | None: ...

    def batch(self, rollout: Rollout) -> B:
        """The batch to learn from a rollout. The rollout's metrics are logged, and it may be kept for replay."""
        ...

    def step(self, batches: Sequence[B], new_rollout: Sequence[B] | None) -> Step[B]:
        """
        The batches that the next optimizer step learns from.

        Args:
            batches (`Sequence[Batch]`):
                The step's share of the last rollout, as micro-batches.
            new_rollout (`Sequence[Batch]`, *optional*):
                All micro-batches of the rollout; given at its first step only.
        """
        ...

    def count(self, batch: B) -> Tensor:
        """The number of tokens or completions that `loss` sums over: ()."""
        ...

    def loss(self, scores: CompletionScores, batch: B) -> LossSums:
        """The loss of a batch that the policy has scored with gradient."""
        ...

    def evaluation_loss(self, batch: B) -> LossSums:
        """The loss of the policy that drew the batch, computed from the rollout's scores."""
        ...

    def report(self, totals: dict[str, float]) -> None:
        """Log metrics from the sums of `loss` over an optimizer step, over all batches and processes."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state from which a resumed run continues: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...
