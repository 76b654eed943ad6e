"""What a trainer holds between two calls of its host: a rollout that is being made, and an optimizer step."""

from dataclasses import dataclass, field

from torch import Tensor

from rlhf_bayes.lm import CompletionScores
from rlhf_bayes.objectives import Batch


@dataclass
class RolloutInFlight:
    """
    A rollout that is being made.

    TRL draws, scores and rewards completions by calls of its own. Each of them leaves its part here, and the
    objective's batch is made of them. After that only the graph is needed, for the first step.
    """

    scored: dict[str, Tensor | None] | None = None
    """Log-probs, entropies, exact KLs and values of each token, (B, T), and log q of each completion, (B,)."""
    rewards_per_func: Tensor | None = None
    """(B, F): what each reward function returned; nan for None, -inf where a completion is forbidden."""
    ended: Tensor | None = None
    """(B,) bool: whether EOS was drawn."""
    graph: CompletionScores | None = None
    """The policy's scores with gradient, where the first step learns from the whole rollout by the same forward."""


@dataclass
class OptimizerStep:
    """An optimizer step from its first micro-batch to its last."""

    batches: list[Batch]
    """Its micro-batches in this process."""
    skipped: bool
    """Whether no weight may move."""
    count: Tensor
    """(): tokens or completions in all micro-batches and processes."""
    graph: CompletionScores | None = None
    """The scores of its only micro-batch, where the forward has been made."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Name -> (): what the losses of the micro-batches so far summed up."""

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of a further micro-batch."""
        self.sums = {name: value + self.sums[name] if self.sums else value for name, value in sums.items()}
