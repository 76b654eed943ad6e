"""The product of several kinds of evidence."""

import itertools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from rlhf_bayes.likelihoods.likelihood import (
    Evidence,
    EvidenceLikelihood,
    Likelihood,
    checked_evidence,
    known_bound,
    known_forbids,
    known_prefixes,
    prefix_log_likelihood,
)


@final
class ProductLikelihood(EvidenceLikelihood):
    r"""
    A product of experts, each to a power:

        log_likelihood(c, x)  =  Σ_k a_k · log_likelihood_k(c, x)

    A completion that one of them forbids is forbidden. A product of products becomes one flat product.

    Args:
        likelihoods (`Sequence[Likelihood]`):
            The experts, at least one.
        powers (`Sequence[float]`, *optional*):
            a_k of each expert, positive and finite. Default: 1 each.

    Attributes:
        bound (`float` or `None`): Σ_k a_k · bound_k, nats, if every bound is known; it may not be tight.
        forbids (`bool` or `None`): True if one of them forbids, False if none does, `None` if one does not say.
        likelihoods (`list[Likelihood]`): the experts, flat.
        powers (`list[float]`): their powers.

    Raises:
        `TypeError`: if a part is not a likelihood, or a power is not a number.
        `ValueError`: if there is no part, or another number of powers, or a power is not positive and finite.

    Source: Hinton 2002, "Training products of experts by minimizing contrastive divergence".
    """

    def __init__(self, likelihoods: Sequence[Likelihood], powers: Sequence[float] | None = None):
        parts = list(likelihoods)
        if not parts:
            raise ValueError("`likelihoods` must hold at least one, got none. Without evidence, take the prior.")
        for part in parts:
            if not isinstance(part, Likelihood):
                raise TypeError(
                    f"`likelihoods` must have a method `log_likelihood` each, got {type(part).__name__}. Wrap a "
                    "reward function in `RewardLikelihood(reward_func, beta)`, a predicate in `Constraint(predicate)`."
                )
        self.likelihoods: list[Likelihood] = []
        self.powers: list[float] = []
        for part, power in zip(parts, _checked_powers(powers, len(parts)), strict=True):
            inner = part if isinstance(part, ProductLikelihood) else None
            self.likelihoods += inner.likelihoods if inner else [part]
            self.powers += [power * exponent for exponent in inner.powers] if inner else [power]

    def _facts(self) -> dict[str, Any]:
        return {"likelihoods": self.likelihoods, "powers": self.powers if set(self.powers) != {1.0} else None}

    @property
    def bound(self) -> float | None:
        """Σ_k a_k · bound_k, nats, or `None` where one of them is not known."""
        total = 0.0
        for part, power in zip(self.likelihoods, self.powers, strict=True):
            bound = known_bound(part)
            if bound is None:
                return None
            total += power * bound
        return total

    @property
    def forbids(self) -> bool | None:
        """True if one of the experts forbids, False if none does, `None` if one does not say and no other forbids."""
        said = [known_forbids(part) for part in self.likelihoods]
        return True if True in said else None if None in said else False

    @property
    def takes_prefixes(self) -> bool:
        """Whether some of the experts take prefixes."""
        return any(map(known_prefixes, self.likelihoods))

    def prefix_log_likelihood(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        The sum over the experts that take prefixes: (N,), fp32, nats.

        Arguments are those of [`Likelihood.log_likelihood`], with prefixes in place of completions.
        """
        return torch.stack(
            [
                power * prefix_log_likelihood(part, prompts, completions, completion_ids, columns).nan_to_num(0.0)
                for part, power in zip(self.likelihoods, self.powers, strict=True)
                if known_prefixes(part)
            ]
        ).sum(0)

    def evidence(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Evidence:
        """
        Σ_k a_k · log_likelihood_k of each completion, and the features of all parts.

        The sum is (B,), fp32, nats, `-inf` where one part is. Where parts share the name of a feature, the second and
        later ones get a number. Arguments are those of [`Likelihood.log_likelihood`].

        Raises:
            `TypeError` or `ValueError`: if a part does not return a finite number or `-inf` for each completion.
        """
        total: Any = None
        features: dict[str, Tensor] = {}
        for part, power in zip(self.likelihoods, self.powers, strict=True):
            # each part is checked before the sum, which could hide an infinity: −inf + inf, or an overflow by a power
            evidence = checked_evidence(part, prompts, completions, completion_ids, columns)
            nats = power * evidence.log_likelihood
            total = nats if total is None else total.to(nats.device) + nats
            for name, values in evidence.features.items():
                features[_free_name(name, features)] = values
        return Evidence(total, features)


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _checked_powers(powers: Sequence[float] | None, num_parts: int) -> list[float]:
    if powers is None:
        return [1.0] * num_parts
    values = list(powers)
    if len(values) != num_parts:
        raise ValueError(f"`powers` must hold one for each of the {num_parts} likelihoods, got {len(values)}.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"`powers` must hold numbers, got {value!r} of type {type(value).__name__}.")
        if not 0 < value < math.inf:
            raise ValueError(
                f"`powers` must be positive and finite, got {value}: a negative one would make of what is forbidden "
                "the only thing allowed. Leave a likelihood out for power 0; for evidence against, negate the reward."
            )
    return [float(value) for value in values]
