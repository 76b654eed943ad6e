"""The protocol of evidence, and checks of what it returns."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf_bayes.notebook import Described


class Evidence(NamedTuple):
    """The log-likelihoods of B completions, and the features that they come from."""

    log_likelihood: Tensor
    """(B,), nats; `-inf` forbids a completion."""
    features: dict[str, Tensor]
    """name -> (B,): features, predicates (0 or 1) or rewards that the evidence comes from, for reports."""


@runtime_checkable
class Likelihood(Protocol):
    """
    Evidence of completions. Any object with this method makes a posterior, `Posterior(prior, likelihood)`.

    It may also have:

    - an attribute `bound` (`float` or `None`), in nats, that `log_likelihood` never exceeds for any prompt and
      completion. Exact rejection sampling needs it. Without the attribute, no bound is known.
    - an attribute `forbids` (`bool` or `None`): True if `log_likelihood` may be `-inf`, False if it never is.
      Objectives that are infinite for a forbidden completion, such as PPO's, refuse evidence with True before the
      model loads. Without the attribute, or with None, they train until `-inf` comes, and then save a checkpoint and
      stop with an error. Samplers and the other objectives take `-inf` either way.
    - a method `evidence`, with the arguments of `log_likelihood`, that returns [`Evidence`].
    - an attribute `takes_prefixes` (`bool`): True if `log_likelihood` may be asked of prefixes of completions, and
      costs little there: see [`~rlhf_bayes.rewards.takes_prefixes`]. A critic of `PPOTrainer` then reads it. Where
      only a part of the evidence may be asked, a method `prefix_log_likelihood`, with the same arguments, gives that
      part.
    """

    def log_likelihood(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        log p(evidence | prompt, completion) up to a constant per prompt: (B,), fp32, nats.

        `-inf` forbids a completion; the posterior refuses NaN and `+inf`.

        Args:
            prompts (`Sequence` of `str` or of chats):
                B prompts.
            completions (`Sequence` of `str` or of chats):
                B completions, in the form of their prompts.
            completion_ids (`Sequence[Sequence[int]]`):
                Token ids of the B completions, up to and including the first EOS.
            columns (`Mapping[str, Sequence]`):
                Columns of the dataset, B entries each.
        """
        ...


class EvidenceLikelihood(Described):
    """Base of the likelihoods that report their features: they define `evidence`, which gives `log_likelihood`."""

    def evidence(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Evidence:
        """
        log_likelihood of each completion, and the features that it comes from.

        Arguments are those of [`Likelihood.log_likelihood`].
        """
        raise NotImplementedError(f"{type(self).__name__} must define `evidence`.")

    def log_likelihood(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        The log-likelihoods of `evidence`: (B,), fp32, nats.

        Arguments are those of [`Likelihood.log_likelihood`]; errors are those of `evidence`.
        """
        return self.evidence(prompts, completions, completion_ids, columns).log_likelihood


def checked_log_likelihood(
    likelihood: Likelihood,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence] | None = None,
) -> Tensor:
    """
    The log-likelihoods of [`checked_evidence`]: (B,), fp32, nats.

    Arguments and errors are those of [`checked_evidence`].
    """
    return checked_evidence(likelihood, prompts, completions, completion_ids, columns).log_likelihood


def checked_evidence(
    likelihood: Likelihood,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence] | None = None,
) -> Evidence:
    """
    What a likelihood returns for B completions, checked, and its features, if it reports any.

    The log-likelihoods are (B,), fp32, nats, without gradient, each finite or `-inf`.

    Args:
        likelihood ([`Likelihood`]):
            The evidence.
        prompts, completions, completion_ids, columns:
            As in [`Likelihood.log_likelihood`].

    Raises:
        `TypeError`: if it does not return a tensor with one number for each completion.
        `ValueError`: if it returns NaN or `+inf`; the error names the row.
    """
    arguments = (prompts, completions, completion_ids, columns)
    tells = getattr(likelihood, "evidence", None)
    evidence = Evidence(likelihood.log_likelihood(*arguments), {}) if tells is None else tells(*arguments)
    return Evidence(_checked(evidence.log_likelihood, likelihood, prompts, completions), evidence.features)


def known_bound(likelihood: Likelihood) -> float | None:
    """`likelihood.bound` in nats, or `None` where none is known."""
    return getattr(likelihood, "bound", None)


def known_forbids(likelihood: Any) -> bool | None:
    """
    `likelihood.forbids`: whether it may return `-inf`, or `None` where it does not say.

    Raises:
        `TypeError`: if the attribute is neither a bool nor `None`.
    """
    forbids = getattr(likelihood, "forbids", None)
    if forbids is not None and not isinstance(forbids, bool):
        raise TypeError(
            f"`{type(likelihood).__name__}.forbids` must be True, False or None, got {forbids!r} of type "
            f"{type(forbids).__name__}. Set it to True if `log_likelihood` may be -inf, to False if it never is."
        )
    return forbids


def known_prefixes(likelihood: Any) -> bool:
    """`likelihood.takes_prefixes`: whether it may be asked of prefixes of completions; False where it does not say."""
    return bool(getattr(likelihood, "takes_prefixes", False))


def prefix_log_likelihood(
    likelihood: Likelihood,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence] | None = None,
) -> Tensor:
    """
    The part of the evidence that prefixes may be asked for, of N prefixes: (N,), fp32, nats; nan where there is none.

    Arguments are those of [`Likelihood.log_likelihood`], with prefixes in place of completions.
    """
    ask = getattr(likelihood, "prefix_log_likelihood", likelihood.log_likelihood)
    return ask(prompts, completions, completion_ids, columns).float().cpu()


def _checked(result: Any, likelihood: Likelihood, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
    name = type(likelihood).__name__
    if not isinstance(result, Tensor) or result.shape != (len(prompts),):
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise TypeError(
            f"`{name}.log_likelihood` must return a tensor of shape ({len(prompts)},), got {got}. Return one "
            "number of nats for each completion."
        )
    result = result.detach().float()
    wrong = (result.isnan() | (result == torch.inf)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"`{name}.log_likelihood` must be finite, or -inf for a forbidden completion; got "
            f"{result[wrong[0]].item()} in row {wrong[0]}: prompt {prompts[wrong[0]]!r}, completion "
            f"{completions[wrong[0]]!r}. Bound the evidence from above (a larger `beta`, or a clipped reward)."
        )
    return result
