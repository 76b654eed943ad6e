"""Values of prefixes of a completion, which guide decoding and twist SMC."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from rlhf_bayes.likelihoods import Likelihood, checked_log_likelihood
from rlhf_bayes.lm import LanguageModel, Prompt
from rlhf_bayes.lm.decoding import PrefixReader
from rlhf_bayes.lm.forward import base_causal_lm
from rlhf_bayes.lm.language_model import as_completion
from rlhf_bayes.lm.trunk import trunk_of


@runtime_checkable
class Value(Protocol):
    r"""
    The value of a prefix, in nats. The optimal one is the soft value

        log_value(c, x_≤t)  =  log E_π0[exp(log_likelihood(c, x)) | x_≤t],

    with which decoding by `π0(x_t)·exp(log_value(x_≤t))` draws from the posterior. Other values, the mean
    E[log_likelihood | x_≤t] among them, do not, but as a proposal or a twist every finite value gives a correct
    sampler. A prefix may be a whole completion. `-inf` means that the posterior allows no completion that starts with
    the prefix; this is not checked.

    A value may also have `next_log_values(prompts, prefixes)`, (B, V): the values of each prefix with each next token,
    where one pass computes them all.
    """

    def log_value(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
        """The values of B prefixes, given as token ids: (B,), nats."""
        ...


@final
class EnumeratedValue:
    r"""
    The soft value itself, by enumeration: `log Σ_x π0(x | x_≤t)·exp(log_likelihood(x))`.

    The sum is over all completions that start with x_≤t, so the model must be as small as
    [`~rlhf_bayes.testing.EnumerableLM`].

    Args:
        prompts (`Sequence` of `str` or of chats):
            P prompts.
        completion_ids (`Sequence[Sequence[int]]`):
            All N completions.
        log_prior, log_likelihood (`Tensor`):
            (P, N), nats.

    Raises:
        KeyError: for a prefix with which no completion starts.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        completion_ids: Sequence[Sequence[int]],
        log_prior: Tensor,
        log_likelihood: Tensor,
    ):
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, ids in enumerate(completion_ids):
            for length in range(len(ids) + 1):
                rows_of.setdefault(tuple(ids[:length]), []).append(row)
        log_density = log_prior.double() + log_likelihood.double()  # (P, N)
        self._values = {
            (repr(prompt), prefix): float(log_density[p, rows].logsumexp(0) - log_prior[p, rows].double().logsumexp(0))
            for p, prompt in enumerate(prompts)
            for prefix, rows in rows_of.items()
        }

    def log_value(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
        """(B,) fp32, nats."""
        keys = [(repr(prompt), tuple(prefix)) for prompt, prefix in zip(prompts, prefixes, strict=True)]
        return torch.tensor([self._values[key] for key in keys])


@final
class PrefixValue:
    r"""
    The evidence of a prefix as if it were the completion: `log_likelihood(c, x_≤t)`.

    With a reward, a prefix reward; with a [`~rlhf_bayes.likelihoods.ClassifierLikelihood`] that was trained on
    prefixes, the attribute's log p(a | x_≤t) of FUDGE.

    Args:
        likelihood (`Likelihood`):
            The evidence. It gets no columns of the dataset.
        tokenizer (`PreTrainedTokenizerBase`):
            Decodes the prefixes, special tokens skipped.
        forbidden_prefix (`float`, *optional*, defaults to `-inf`):
            Value, nats, of a prefix that would be forbidden as a completion. `-inf` is right only if all that starts
            so is forbidden too. For evidence such as "must contain a word", pass a finite number.

    Source: Yang & Klein 2021 (FUDGE), arXiv 2104.05218, section 3.
    """

    def __init__(self, likelihood: Likelihood, tokenizer: Any, forbidden_prefix: float = -math.inf):
        self.likelihood = likelihood
        self.tokenizer = tokenizer
        self.forbidden_prefix = forbidden_prefix

    def log_value(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
        """(B,) fp32, nats."""
        texts = self.tokenizer.batch_decode([list(prefix) for prefix in prefixes], skip_special_tokens=True)
        completions = [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        nats = checked_log_likelihood(self.likelihood, prompts, completions, prefixes)
        return torch.where(nats == -torch.inf, self.forbidden_prefix, nats)


@final
class HeadValue:
    """
    A head on a language model's hidden states, such as a classifier on prefixes (FUDGE) or a learnt twist.

    The model reads one token a step.

    Args:
        lm ([`~rlhf_bayes.LanguageModel`]):
            The model that reads the prefixes.
        head (`Callable`):
            A function from hidden states (B, H) to nats (B,), for instance
            `lambda hidden: logsigmoid(classifier(hidden)[:, 0])`.
    """

    def __init__(self, lm: LanguageModel, head: Callable[[Tensor], Tensor]):
        self.head = head
        self._reader = PrefixReader(lm, trunk_of(base_causal_lm(lm.model)))

    @torch.no_grad()
    def log_value(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
        """(B,) nats."""
        return self.head(self._reader.read(prompts, prefixes).hidden)


@final
class ExpertsValue:
    r"""
    Experts minus anti-experts: `scale·(log p⁺(x_≤t | c) − log p⁻(x_≤t | c))`.

    Decoding with it is DExperts: next-token logits `z + scale·(z⁺ − z⁻)`. All next tokens come from one pass.

    Args:
        expert, anti_expert ([`~rlhf_bayes.LanguageModel`]):
            Models with the prior's tokens.
        scale (`float`):
            DExperts' α.

    Raises:
        ValueError: if the two have vocabularies of different sizes, or `scale` is not finite.

    Source: Liu et al. 2021 (DExperts), arXiv 2105.03023, section 2.
    """

    def __init__(self, expert: LanguageModel, anti_expert: LanguageModel, scale: float = 1.0):
        sizes = [base_causal_lm(lm.model).config.get_text_config().vocab_size for lm in (expert, anti_expert)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"`expert` and `anti_expert` must share a vocabulary, got {sizes[0]} and {sizes[1]} ids.")
        if not abs(scale) < float("inf"):
            raise ValueError(f"`scale` must be finite, got {scale}.")
        self.scale = scale
        self._readers = PrefixReader(expert), PrefixReader(anti_expert)

    def log_value(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
        """(B,) fp32, nats."""
        expert, anti_expert = (reader.read(prompts, prefixes).log_prob for reader in self._readers)
        return self.scale * (expert - anti_expert)

    def next_log_values(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
        """(B, V) fp32, nats."""
        states = [reader.read(prompts, prefixes) for reader in self._readers]
        expert, anti_expert = (
            state.log_prob[:, None] + reader.next_log_probs(state.hidden)
            for state, reader in zip(states, self._readers, strict=True)
        )
        return self.scale * (expert - anti_expert)


def checked_log_value(value: Value, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
    """
    The values of B prefixes, checked: (B,), fp32 or better, nats, finite or `-inf`.

    Raises:
        TypeError: if they are not a tensor with one number for each prefix.
        ValueError: if one is nan or `+inf`; the error names the prefix.
    """
    result = value.log_value(prompts, prefixes)
    if not isinstance(result, Tensor) or result.shape != (len(prefixes),):
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise TypeError(
            f"`{type(value).__name__}.log_value` must return a tensor of shape ({len(prefixes)},), got {got}. Return "
            "one number of nats for each prefix."
        )
    return _without_nan(value, result, prompts, prefixes)


def checked_next_log_values(value: Any, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
    """The values of each next token, checked: (B, V). Errors are those of [`checked_log_value`]."""
    return _without_nan(value, value.next_log_values(prompts, prefixes), prompts, prefixes)


def _without_nan(value: Any, result: Tensor, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
    result = result.detach()
    wrong = (result.isnan() | (result == torch.inf)).nonzero()
    if len(wrong):
        row = int(wrong[0, 0])
        raise ValueError(
            f"`{type(value).__name__}` must be finite, or -inf where nothing that the posterior allows starts so; got "
            f"{float(result[tuple(wrong[0])])} for prompt {prompts[row]!r} and prefix {list(prefixes[row])}."
        )
    return result if result.dtype == torch.float64 else result.float()


def rows_of(columns: Mapping[str, Sequence] | None, rows: Sequence[int]) -> dict[str, list]:
    """Columns of the dataset, for these rows."""
    return {name: [values[row] for row in rows] for name, values in (columns or {}).items()}
