"""A hard constraint as evidence: completions that do not meet it are forbidden."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import nn

from rlhf_bayes.likelihoods.likelihood import Evidence, EvidenceLikelihood
from rlhf_bayes.rewards import RewardScorer


@final
class Constraint(EvidenceLikelihood):
    r"""
    Evidence of a predicate that must hold:

        log_likelihood(c, x)  =  0 where b(c, x) = 1,  −inf where b(c, x) = 0

    The posterior π0(x | c) · b(c, x) / Z(c) is the prior given that b holds. A binary reward under `RewardLikelihood`
    is a preference instead: it forbids nothing.

    Args:
        predicate (`Callable`):
            b, in the protocol of TRL's reward functions, sync or async: `f(prompts=, completions=, completion_ids=,
            **columns)` returning `bool`, 0 or 1 for each completion.

    Attributes:
        bound (`float`): 0 nats. A draw from the prior that meets the predicate is an exact draw from the posterior.
        forbids (`bool`): True.
        name (`str`): name of the predicate.

    Raises:
        `TypeError`: if `predicate` is not a function.

    Source: Khalifa, Elsahar & Dymetman 2021, arXiv 2012.11635, section 2.1, "pointwise constraints".
    """

    bound: float | None = 0.0
    forbids: bool | None = True

    def __init__(self, predicate: Callable):
        if isinstance(predicate, (str, nn.Module)) or not callable(predicate):
            raise TypeError(
                f"`predicate` must be a function that says for each completion whether it is allowed, got "
                f"{type(predicate).__name__}. Pass `f(prompts, completions, **kwargs)` returning a list of bools; for "
                "a model, use `ClassifierLikelihood`, or compare its score with a threshold in the function."
            )
        self._scorer = RewardScorer(predicate)
        self.name = self._scorer.names[0]

    def _facts(self) -> dict[str, Any]:
        return {"predicate": self.name}

    def evidence(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Evidence:
        """
        0 or `-inf` for each completion, (B,), fp32, and the predicate as a feature, 1 or 0.

        Arguments are those of [`Likelihood.log_likelihood`].

        Raises:
            `TypeError` or `ValueError`: if the predicate raises, or returns something other than `bool`, 0 or 1 for a
                completion; the error names the row.
        """
        values = self._scorer(prompts, completions, completion_ids, columns)[:, 0]  # (B,)
        wrong = ((values != 0) & (values != 1)).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            got = "None" if values[row].isnan() else f"{values[row].item():.6g}"
            raise ValueError(
                f"The predicate '{self.name}' must return True or False (or 1 or 0) for each completion, got {got} in "
                f"row {row}: prompt {prompts[row]!r}, completion {completions[row]!r}. Compare a score with a "
                "threshold, or use `RewardLikelihood` for evidence by degrees."
            )
        return Evidence(torch.where(values == 1, 0.0, -torch.inf), {self.name: values})
