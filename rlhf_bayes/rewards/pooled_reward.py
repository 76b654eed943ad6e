"""Combines an ensemble's members by a rule, after centering them: comparisons do not fix a constant per prompt."""

import json
from collections.abc import Sequence
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.notebook import Described
from rlhf_bayes.numerics import pool
from rlhf_bayes.numerics.pooling import pool_centered


class MemberRewards(Protocol):
    """The protocol of an ensemble that can be pooled."""

    def member_rewards(self, prompts: Sequence, completions: Sequence) -> Tensor:
        """Reward of each completion by each member: (K, B)."""
        ...


@final
class PromptCenters:
    """
    Mean of each member's reward under the prior, prompt by prompt: E_π0[r_k(c, x) | c].

    Args:
        prompts (`Sequence` of `str` or of chats): P prompts, each once.
        means (`torch.Tensor` of shape `(K, P)`): The means, in units of reward.

    Raises:
        `ValueError`: if shapes do not match, or means are not finite.
    """

    def __init__(self, prompts: Sequence, means: Tensor):
        if means.ndim != 2 or means.shape[1] != len(prompts) or not means.isfinite().all():
            raise ValueError(
                f"`means` must be finite, of shape (K, P) with P = {len(prompts)} prompts, got shape "
                f"{tuple(means.shape)}{'' if means.isfinite().all() else ' with nan or inf'}. Use `prompt_centers`."
            )
        self.means = means.float().cpu()  # (K, P)
        self._columns = {_key(prompt): column for column, prompt in enumerate(prompts)}

    def __len__(self) -> int:
        return len(self._columns)

    def of(self, prompts: Sequence) -> Tensor:
        """
        The means of B prompts: (K, B).

        Raises:
            `ValueError`: if a prompt has no mean.
        """
        columns = [self._columns.get(_key(prompt)) for prompt in prompts]
        unknown = [prompt for prompt, column in zip(prompts, columns, strict=True) if column is None]
        if unknown:
            raise ValueError(
                f"`centers` must hold all prompts, and {len(unknown)} of {len(prompts)} are missing, the first "
                f"{unknown[0]!r}. Compute them with `prompt_centers(ensemble, prior, prompts)` for all prompts that "
                "will be scored, those of evaluation included."
            )
        return self.means[:, columns]  # pyright: ignore[reportArgumentType]


def prompt_centers(
    ensemble: MemberRewards,
    prior: LanguageModel,
    prompts: Sequence,
    num_samples: int = 64,
    generator: torch.Generator | None = None,
) -> PromptCenters:
    """
    Estimate E_π0[r_k(c, x) | c] of each member from completions of the prior.

    Its standard error is that of a mean of `num_samples` rewards. This error shifts a member by a constant, the same
    for all completions of a prompt.

    Args:
        ensemble ([`RewardEnsemble`] or what has its `member_rewards`): The members, normalised already.
        prior ([`~rlhf_bayes.LanguageModel`]): π0.
        prompts (`Sequence` of `str` or of chats): The prompts; those that occur twice are drawn for once.
        num_samples (`int`, *optional*, defaults to `64`): Completions drawn for each.
        generator (`torch.Generator`, *optional*): Makes the draw reproducible. Default: the global random state.
    """
    distinct = list({_key(prompt): prompt for prompt in prompts}.values())  # P
    draws = prior.sample(distinct, n=num_samples, generator=generator)
    rewards = ensemble.member_rewards(draws.prompts, draws.completions)  # (K, P · n)
    return PromptCenters(distinct, rewards.unflatten(1, (len(distinct), num_samples)).mean(-1))


@final
class PooledReward(Described):
    """
    An ensemble's members combined by a rule, as a reward function of TRL's protocol.

        r(c, x)  =  pool_k[r_k(c, x) − m_k(c)] + 1/K Σ_k m_k(c),        m_k(c) = E_π0[r_k(c, x) | c]

    Comparisons determine rewards only up to a constant per prompt. Such constants shift the mean of the members by a
    constant, which does not change a posterior, but with every other rule they change which completions are preferred.
    So each member is centered under the prior first, and the mean of the centers is added back.

    Args:
        ensemble ([`RewardEnsemble`] or what has its `member_rewards`): The members.
        rule (`str`): One of [`~rlhf_bayes.numerics.POOLING_RULES`]; see [`~rlhf_bayes.numerics.pool`].
        beta (`float`, *optional*): β of the posterior, for the rules that use it.
        penalty (`float`, *optional*): Weight of the variance, for `"mean_minus_variance"`.
        centers ([`PromptCenters`] or `False`, *optional*): The members' centers, from [`prompt_centers`]; `False` says
            that the members are comparable as they are. Not used by the mean.

    Raises:
        `ValueError`: if the rule is unknown, lacks a parameter or `centers`, or does not use a parameter.
    """

    def __init__(
        self,
        ensemble: MemberRewards,
        rule: str,
        beta: float | None = None,
        penalty: float | None = None,
        centers: PromptCenters | Literal[False] | None = None,
    ):
        pool(torch.zeros(1, 1), rule, beta, penalty)  # refuses what the rule cannot use
        if centers is True or not isinstance(centers, PromptCenters | bool | None):
            raise TypeError(f"`centers` must be PromptCenters, False or None, got {centers!r}. Use `prompt_centers`.")
        if rule == "mean" and isinstance(centers, PromptCenters):
            raise ValueError("`centers` must be left out with the rule 'mean', which they do not change.")
        if rule != "mean" and centers is None:
            raise ValueError(
                f"`centers` must be given for the rule '{rule}': members are known up to a constant per prompt, which "
                "changes what it prefers. Pass `prompt_centers(ensemble, prior, prompts)`, or False if the members "
                "are comparable as they are."
            )
        self.ensemble, self.rule, self.beta, self.penalty = ensemble, rule, beta, penalty
        self.centers = centers if isinstance(centers, PromptCenters) else None
        self.__name__ = f"{getattr(ensemble, '__name__', type(ensemble).__name__)}_{rule}"

    def _facts(self) -> dict[str, Any]:
        return {"ensemble": self.ensemble, "rule": self.rule, "beta": self.beta, "penalty": self.penalty}

    @property
    def takes_prefixes(self) -> bool:
        """Whether a trainer asks for the rewards of prefixes by default: where the ensemble takes prefixes."""
        return getattr(self.ensemble, "takes_prefixes", False)

    def rewards(self, prompts: Sequence, completions: Sequence) -> Tensor:
        """The pooled reward of each completion: (B,), fp32."""
        return self._pooled(*self._members(prompts, completions))

    def __call__(self, prompts: list, completions: list, log_metric: Any = None, **columns: Any) -> list[float]:
        """
        Pooled reward of each completion, in TRL's protocol of reward functions.

        The spread of the centered members (standard deviation over members, mean over completions) goes to
        `log_metric` as `reward_spread`. `columns` are TRL's other arguments, which are not needed.
        """
        rewards, means = self._members(prompts, completions)  # (K, B)
        if log_metric is not None and rewards.numel():
            centered = rewards if means is None else rewards - means
            log_metric("reward_spread", centered.std(0, correction=0).mean().item())
        return self._pooled(rewards, means).tolist()

    def _members(self, prompts: Sequence, completions: Sequence) -> tuple[Tensor, Tensor | None]:
        """Rewards of the members, and their centers: (K, B) each."""
        rewards = self.ensemble.member_rewards(prompts, completions)
        if self.centers is None:
            return rewards, None
        means = self.centers.of(prompts)
        if means.shape != rewards.shape:
            raise ValueError(
                f"`centers` must have one row for each of the {rewards.shape[0]} members, got {means.shape[0]}. "
                "Compute them again with this ensemble."
            )
        return rewards, means.to(rewards.device)

    def _pooled(self, rewards: Tensor, means: Tensor | None) -> Tensor:
        if means is None:
            return pool(rewards, self.rule, self.beta, self.penalty)  # (B,)
        return pool_centered(rewards, means, self.rule, self.beta, self.penalty)  # (B,)


def _key(prompt: Any) -> str:
    # the keys of texts and chats differ: JSON starts a text with a quote and a chat with a bracket
    return json.dumps(prompt if isinstance(prompt, str) else list(prompt), sort_keys=True)
