"""What a posterior needs to know about the evidence."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Likelihood(Protocol):
    """
    Evidence of completions. Any object with this method makes a posterior, `Posterior(prior, likelihood)`.

    It may also have an attribute `bound` (`float` or `None`), in nats, that `log_likelihood` never exceeds for any
    prompt and completion: what exact sampling by rejection needs. Without one, no bound is known.
    """

    def log_likelihood(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        log p(evidence | prompt, completion) up to a constant per prompt, in nats: (B,), fp32. `-inf` forbids a
        completion; NaN and `+inf` are refused by the posterior.
        """
        ...
