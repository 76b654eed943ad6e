"""The posterior of a prior and a likelihood, and the shortest ways to make one.

A language model is tilted by a reward, conditioned on a predicate, or constrained to given moments.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from rlhf_bayes.likelihoods import (
    Constraint,
    Likelihood,
    MomentLikelihood,
    ProductLikelihood,
    RewardLikelihood,
    checked_log_likelihood,
    known_bound,
    known_forbids,
)
from rlhf_bayes.lm.language_model import as_completion
from rlhf_bayes.notebook import Described
from rlhf_bayes.rewards import RewardFunc, check_rows

if TYPE_CHECKING:
    from rlhf_bayes.lm import LanguageModel
    from rlhf_bayes.samplers import Draws


@final
class Posterior(Described):
    r"""
    The distribution over completions given prior and evidence (Korbak, Perez & Buckley 2022, arXiv 2205.11275):

        π*(x | c)  =  π0(x | c) · exp(log_likelihood(c, x)) / Z(c)

    It gives the density up to Z(c), which depends on the prompt. Samplers draw from it, and trainers train towards it.

    A completion may be given as text, as token ids, or both:

    - **both**: the ids are scored by the prior and the text by the likelihood, as in training, where the text is
      decoded from the ids.
    - **ids only** (`completions=None`): the text is the ids decoded by the prior's tokenizer with special tokens
      skipped; for a chat prompt, it is one assistant message with that text.
    - **text only** (`completion_ids=None`): the ids are those of the prior's tokenizer on the completion alone, with
      `add_special_tokens=False`, then its EOS; for a chat, of the content of the one assistant message. A text of
      exactly `max_completion_length` tokens is the truncated completion and gets no EOS, a longer one is refused.
      Other sequences of tokens may decode to the same text; their mass is not counted.

    Args:
        prior (`LanguageModel`):
            π0, a distribution over completions.
        likelihood (`Likelihood`):
            Evidence, for instance a `RewardLikelihood`.

    Raises:
        `TypeError`: if the prior has no `log_prob`, or the likelihood no `log_likelihood`.
    """

    def __init__(self, prior: "LanguageModel", likelihood: Likelihood):
        if not hasattr(prior, "log_prob"):
            raise TypeError(
                f"`prior` must be a LanguageModel, got {type(prior).__name__}, which has no `log_prob`. Wrap the "
                "model: `LanguageModel(model, tokenizer)`."
            )
        if not isinstance(likelihood, Likelihood):
            raise TypeError(
                f"`likelihood` must have a method `log_likelihood`, got {type(likelihood).__name__}. For a reward "
                "function, use `prior.tilt(reward_funcs, beta)`."
            )
        self.prior = prior
        self.likelihood = likelihood

    def _facts(self) -> dict[str, Any]:
        return {"prior": self.prior, "likelihood": self.likelihood, "bound": self.bound, "forbids": self.forbids}

    @property
    def beta(self) -> float | None:
        """Units of reward per nat of evidence, or `None` where the likelihood has no such scale."""
        return getattr(self.likelihood, "beta", None)

    @property
    def bound(self) -> float | None:
        """Upper bound on `log_likelihood` in nats, or `None` if none is known. Exact rejection sampling needs it."""
        return known_bound(self.likelihood)

    @property
    def forbids(self) -> bool | None:
        """Whether `log_likelihood` may be `-inf`, or `None` where the likelihood does not say."""
        return known_forbids(self.likelihood)

    def tilt(self, reward_funcs: RewardFunc | Sequence[RewardFunc], beta: float, **options: Any) -> "Posterior":
        """π*(x | c)·exp(r(c, x)/β)/Z′(c), a reward on top of this evidence: see [`tilt`], which takes the options."""
        return self._with(tilt(self.prior, reward_funcs, beta, **options).likelihood)

    def condition(self, predicate: Callable) -> "Posterior":
        """π*(x | c)·b(c, x)/Z′(c), a hard constraint on top of this evidence: see [`condition`]."""
        return self._with(Constraint(predicate))

    def constrain(
        self, constraints: Mapping[str, tuple[RewardFunc, float]], prompts: Sequence[Any], **options: Any
    ) -> "Posterior":
        """
        The distribution closest in KL to this posterior in which features have given means.

        `MomentLikelihood.fit` finds it, starting from this evidence, and takes the options.
        """
        return self._with(MomentLikelihood.fit(self.prior, constraints, prompts, evidence=self.likelihood, **options))

    def sample(
        self,
        prompts: Sequence[Any],
        n: int = 1,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> "Draws":
        """
        n completions of each prompt, without training, by the sampler that fits: see [`draw_from_posterior`].

        `guarantee` of the result says what the draws are worth, `info["sampler"]` by which sampler they came.

        Args:
            prompts (`Sequence` of `str` or of chats):
                P prompts.
            n (`int`, *optional*, defaults to `1`):
                Completions for each prompt.
            generator (`torch.Generator`, *optional*):
                Makes the draws reproducible.
            columns (`Mapping[str, Sequence]`, *optional*):
                Columns of the dataset that reward functions ask for, P entries each.
        """
        # an import from a higher layer, made only when called: users start from the posterior
        from rlhf_bayes.samplers.default_sampler import draw_from_posterior

        return draw_from_posterior(self, prompts, n, generator, columns)

    def log_likelihood(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        Evidence of each completion, in nats: (B,), fp32, on the prior's device; `-inf` where it is forbidden.

        Args:
            prompts (`Sequence` of `str` or of chats):
                B prompts.
            completions (`Sequence` of `str` or of chats, *optional*):
                B completions, in the prompt's form. Default: decoded from the ids.
            completion_ids (`Sequence[Sequence[int]]`, *optional*):
                B completions: token ids up to and including the first EOS, or `max_completion_length` tokens. Default:
                the tokenised text.
            columns (`Mapping[str, Sequence]`, *optional*):
                Columns of the dataset that reward functions ask for, B entries each.

        Raises:
            `TypeError` or `ValueError`: if inputs do not fit together, or evidence is not a number per completion.
        """
        completions, ids = self._both_forms(prompts, completions, completion_ids)
        return self._log_likelihood(prompts, completions, ids, columns)

    def log_density(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        log π0(x | c) + log_likelihood(c, x) of each completion, in nats: (B,), fp32, on the prior's device.

        It is unnormalised: log π*(x | c) + log Z(c). Arguments and errors are those of [`Posterior.log_likelihood`]. A
        completion outside of the prior's support is refused too.
        """
        completions, ids = self._both_forms(prompts, completions, completion_ids)
        log_prior = self.prior.log_prob(
            prompts, ids
        )  # (B,); computed first, since it refuses ids outside of the support
        return log_prior + self._log_likelihood(prompts, completions, ids, columns).to(log_prior.device)

    def _with(self, likelihood: Likelihood) -> "Posterior":
        return Posterior(self.prior, ProductLikelihood([self.likelihood, likelihood]))

    def _log_likelihood(
        self, prompts: Sequence[Any], completions: Sequence[Any], ids: list[list[int]], columns: Any
    ) -> Tensor:
        result = checked_log_likelihood(self.likelihood, prompts, completions, ids, columns)
        return result.to(self.prior.device)

    def _both_forms(
        self, prompts: Sequence[Any], completions: Sequence[Any] | None, completion_ids: Sequence[Sequence[int]] | None
    ) -> tuple[list, list[list[int]]]:
        if isinstance(prompts, str):
            raise TypeError(f"`prompts` must be a list with one prompt per completion, got {prompts!r}. Pass a list.")
        if completions is None and completion_ids is None:
            raise ValueError("One of `completions` and `completion_ids` must be given, got neither. Pass either.")
        ids = [row.tolist() if isinstance(row, Tensor) else list(row) for row in completion_ids or ()]
        if completions is None:
            check_rows(prompts, prompts, ids)
            tokenizer: Any = self.prior.tokenizer
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            completions = [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        elif completion_ids is None:
            check_rows(prompts, completions, completions)
            ids = [self._token_ids(row, completion) for row, completion in enumerate(completions)]
        check_rows(prompts, completions, ids)
        return list(completions), ids

    def _token_ids(self, row: int, completion: str | list[dict]) -> list[int]:
        prior = self.prior
        text = completion if isinstance(completion, str) else _only_content(row, completion)
        tokenizer: Any = prior.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > prior.max_completion_length:
            raise ValueError(
                f"`completions` must have at most `max_completion_length` = {prior.max_completion_length} tokens, row "
                f"{row} has {len(ids)}: {text!r}. Shorten it, or make the prior's `max_completion_length` larger."
            )
        ended = bool(ids) and ids[-1] in prior.eos_token_ids
        if not ended and len(ids) < prior.max_completion_length:
            ids = [*ids, prior.eos_token_ids[0]]
        return ids


def tilt(
    prior: "LanguageModel",
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    beta: float,
    *,
    reward_weights: Sequence[float] | None = None,
    reward_clip_range: tuple[float, float] | None = None,
    missing_eos_penalty: float | None = None,
    reward_processing_classes: Any = None,
) -> Posterior:
    r"""
    The posterior that KL-regularised RL trains towards:

        π*(x | c)  =  π0(x | c) · exp(r(c, x) / beta) / Z(c)

    All settings that change the posterior are arguments here, with TRL's names.

    Args:
        prior (`LanguageModel`):
            π0.
        reward_funcs (`Callable`, `torch.nn.Module`, `str`, or a list of these):
            Reward functions of TRL's protocol, sequence-classification models, or paths to such models, which are put
            on the prior's device.
        beta (`float`):
            Units of reward per nat of evidence, TRL's `beta`; positive. At 0 the optimum is an argmax, and there is no
            posterior.
        reward_weights (`list[float]`, *optional*):
            One weight per function. Default: 1 each.
        reward_clip_range (`tuple[float, float]`, *optional*):
            Bounds of the weighted sum.
        missing_eos_penalty (`float`, *optional*):
            Subtracted, after clipping, from completions that were cut before an EOS.
        reward_processing_classes (`PreTrainedTokenizerBase` or list, *optional*):
            Tokenizers of the reward models. Default: the one saved beside each.

    Returns:
        [`Posterior`]

    Raises:
        `TypeError` or `ValueError`: if an argument is out of range; see `RewardLikelihood`.
    """
    likelihood = RewardLikelihood(
        reward_funcs,
        beta,
        reward_weights=reward_weights,
        reward_clip_range=reward_clip_range,
        missing_eos_penalty=missing_eos_penalty,
        reward_processing_classes=reward_processing_classes,
        eos_token_ids=prior.eos_token_ids,
        device=prior.device,
    )
    return Posterior(prior, likelihood)


def condition(prior: "LanguageModel", predicate: Callable) -> Posterior:
    r"""
    The prior, given that a predicate holds:

        π*(x | c)  =  π0(x | c) · b(c, x) / Z(c)

    Z(c) is the probability that the prior meets it. Of all distributions that always meet it, the posterior is the
    closest to the prior, at KL(π*‖π0) = −log Z(c).

    Args:
        prior (`LanguageModel`):
            π0.
        predicate (`Callable`):
            b, in the protocol of TRL's reward functions: `bool`, 0 or 1 for each completion.

    Returns:
        [`Posterior`], with `bound` 0: a draw from the prior that meets the predicate is an exact draw.

    Raises:
        `TypeError`: if it is not a function. What it returns is checked at each call, see `Constraint`.

    Source: Khalifa, Elsahar & Dymetman 2021, arXiv 2012.11635, "pointwise constraints"; a prompt's own Z as in Korbak
    et al. 2022, arXiv 2112.00791.
    """
    return Posterior(prior, Constraint(predicate))


def constrain(
    prior: "LanguageModel",
    constraints: Mapping[str, tuple[RewardFunc, float]],
    prompts: Sequence[Any],
    *,
    num_samples: int = 256,
    generator: torch.Generator | None = None,
    proposal: "LanguageModel | None" = None,
    columns: Mapping[str, Sequence] | None = None,
    feature_bounds: Mapping[str, tuple[float, float]] | None = None,
) -> Posterior:
    """
    The distribution closest in KL to the prior in which features have given means.

    Arguments are those of [`MomentLikelihood.fit`]. `posterior.likelihood.summary` has the uncertainty of λ.
    """
    likelihood = MomentLikelihood.fit(
        prior,
        constraints,
        prompts,
        num_samples=num_samples,
        generator=generator,
        proposal=proposal,
        columns=columns,
        feature_bounds=feature_bounds,
    )
    return Posterior(prior, likelihood)


def _only_content(row: int, messages: list[dict]) -> str:
    if len(messages) != 1 or not isinstance(messages[0].get("content"), str):
        raise ValueError(
            f"`completions` must hold one assistant message with a text, row {row} has {messages!r}. Pass "
            "`completion_ids` for other chats: they say which tokens the model drew."
        )
    return messages[0]["content"]
