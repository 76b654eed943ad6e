"""State that a trainer keeps between TRL's calls: the rollout that is being made, and the current optimizer step."""

from dataclasses import dataclass, field

from torch import Tensor

from rlhf_bayes.lm import CompletionScores
from rlhf_bayes.objectives import Batch


@dataclass
class RolloutInFlight:
    """
    A rollout that is being made.

    TRL draws, scores and rewards completions in separate calls. Each stores its part here, and the objective's batch
    is made from all parts. After that only the graph is needed, for the first step.
    """

    scored: dict[str, Tensor | None] | None = None
    """Log-probs, entropies, exact KLs and values of each token, (B, T), and log q of each completion, (B,)."""
    engine_log_probs: Tensor | None = None
    """(B,): the engine's own log-prob of each completion, nats; None where no engine drew."""
    rewards_per_func: Tensor | None = None
    """(B, F): results of each reward function; nan for None, -inf where a completion is forbidden."""
    prefix_rewards: Tensor | None = None
    """(B, T): r of the tokens before t, where the reward functions are asked for it."""
    ended: Tensor | None = None
    """(B,) bool: whether EOS was drawn."""
    graph: CompletionScores | None = None
    """The policy's scores with gradient, where the first step reuses the forward that scored the rollout."""


@dataclass
class OptimizerStep:
    """An optimizer step from its first micro-batch to its last."""

    batches: list[Batch]
    """The micro-batches of this process."""
    skipped: bool
    """Whether the step is skipped, so that no weight may change."""
    count: Tensor
    """(): number of tokens or completions in all micro-batches and processes."""
    graph: CompletionScores | None = None
    """The scores of its only micro-batch, if the forward was run already."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Name -> (): sums from the losses of the micro-batches so far."""

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of a further micro-batch."""
        self.sums = {name: value + self.sums[name] if self.sums else value for name, value in sums.items()}
