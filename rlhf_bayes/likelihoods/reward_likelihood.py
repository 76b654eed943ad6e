"""Reward as evidence: exp(r / beta)."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from rlhf_bayes.likelihoods.combine import combine_rewards
from rlhf_bayes.likelihoods.likelihood import Evidence, EvidenceLikelihood
from rlhf_bayes.rewards import RewardFunc, RewardScorer
from rlhf_bayes.rewards.prefix_rewards import takes_prefixes_of


@final
class RewardLikelihood(EvidenceLikelihood):
    r"""
    Evidence of a reward, as KL-regularised RL implies it:

        log_likelihood(c, x)  =  r(c, x) / beta
        r(c, x)  =  clip(sum_f w_f r_f(c, x))  -  missing_eos_penalty * [no EOS]

    With a prior π0, the posterior π0 · exp(r / beta) / Z maximises E[r] − beta · KL(π‖π0) (Korbak, Perez & Buckley
    2022, arXiv 2205.11275, equation 5).

    Args:
        reward_funcs (`Callable`, `torch.nn.Module`, `str`, or a list of these):
            Reward functions of TRL's protocol, sequence-classification models, or paths to such models. A function may
            return `-inf` for a completion that it forbids.
        beta (`float`):
            Units of reward per nat of evidence; positive and finite.
        reward_weights (`list[float]`, *optional*):
            One finite weight per function. Default: 1 each.
        reward_clip_range (`tuple[float, float]`, *optional*):
            Bounds of the weighted sum.
        missing_eos_penalty (`float`, *optional*):
            Subtracted, after clipping, from completions that were cut before an EOS; not negative.
        reward_processing_classes (`PreTrainedTokenizerBase` or list, *optional*):
            Tokenizers of the reward models. Default: the one saved beside each.
        eos_token_ids (`list[int]`, *optional*):
            The tokens that end a completion. Needed with `missing_eos_penalty`.
        device (`torch.device`, *optional*):
            Where to put reward models that are loaded from a path.

    Attributes:
        forbids (`bool` or `None`): `None`, because a reward function does not say whether it returns `-inf`. Set it to
            True for one that does.

    Raises:
        `TypeError` or `ValueError`: if an argument is out of range.
    """

    forbids: bool | None = None

    def __init__(
        self,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        beta: float,
        reward_weights: Sequence[float] | None = None,
        reward_clip_range: tuple[float, float] | None = None,
        missing_eos_penalty: float | None = None,
        reward_processing_classes: Any = None,
        eos_token_ids: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ):
        self.beta = check_beta(beta)
        self.reward_clip_range = _checked_clip_range(reward_clip_range)
        self.missing_eos_penalty = _checked_penalty(missing_eos_penalty, eos_token_ids)
        self.eos_token_ids = frozenset(eos_token_ids or ())
        num_funcs = len(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else 1
        self.reward_weights = _checked_weights(reward_weights, num_funcs)  # (F,)
        # last, since it may load models: wrong arguments are refused before
        self._scorer = RewardScorer(reward_funcs, reward_processing_classes, device, allow_forbidden=True)

    def _facts(self) -> dict[str, Any]:
        weights = self.reward_weights.tolist()
        return {
            "rewards": self.reward_names,
            "beta": self.beta,
            "reward_weights": weights if set(weights) != {1.0} else None,
            "reward_clip_range": self.reward_clip_range,
            "missing_eos_penalty": self.missing_eos_penalty,
        }

    @property
    def reward_names(self) -> list[str]:
        """Names of the reward functions, as TRL logs them."""
        return self._scorer.names

    @property
    def reward_funcs(self) -> dict[str, Any]:
        """Name -> reward function or model, in the order of the weights."""
        return self._scorer.functions

    @property
    def bound(self) -> float | None:
        """Upper end of `reward_clip_range` over `beta`, nats; `None` where the reward is not clipped."""
        if self.reward_clip_range is None or self.reward_clip_range[1] == math.inf:
            return None
        # computed in fp32 like the log-likelihoods, so that rounding puts none of them above the bound
        return float(torch.tensor(self.reward_clip_range[1]) / self.beta)

    def rewards_per_func(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        What each function returned, before weights, clipping and penalty: (B, F), fp32, nan for None.

        Arguments are those of [`Likelihood.log_likelihood`].
        """
        return self._scorer(prompts, completions, completion_ids, columns)

    @property
    def takes_prefixes(self) -> bool:
        """Whether some of the reward functions take prefixes."""
        return any(map(takes_prefixes_of, self.reward_funcs.values()))

    def prefix_log_likelihood(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        r / beta of prefixes, of the reward functions that take prefixes, without the penalty: (N,), fp32, nats.

        It is nan where each of them returned `None`. Arguments are those of [`Likelihood.log_likelihood`].
        """
        asked = [takes_prefixes_of(func) for func in self.reward_funcs.values()]
        rewards = self._scorer(prompts, completions, completion_ids, columns, asked)  # (N, F)
        return combine_rewards(rewards, self.reward_weights, self.reward_clip_range) / self.beta

    def rewards(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        r(c, x) of each completion, weighted, clipped and penalised: (B,), fp32, in units of reward.

        Arguments are those of [`Likelihood.log_likelihood`].

        Raises:
            `ValueError`: if every function returned `None` for a completion.
        """
        rewards_per_func = self.rewards_per_func(prompts, completions, completion_ids, columns)  # (B, F)
        ended = None
        if self.missing_eos_penalty is not None:
            ended = torch.tensor([bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids])  # (B,)
        rewards = combine_rewards(
            rewards_per_func, self.reward_weights, self.reward_clip_range, self.missing_eos_penalty, ended
        )
        unscorable = rewards.isnan().nonzero().flatten().tolist()
        if unscorable:
            row = unscorable[0]
            raise ValueError(
                "A posterior needs evidence for each completion, and every reward function "
                f"({', '.join(self.reward_names)}) returned None for {len(unscorable)} of {len(rewards)}, the first "
                f"in row {row}: prompt {prompts[row]!r}, completion {completions[row]!r}. Return 0 from one of them "
                "where there is no evidence for or against."
            )
        return rewards

    def evidence(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Evidence:
        """
        r(c, x) / beta of each completion, (B,), fp32, nats, and r as the feature `"reward"`.

        Arguments are those of [`Likelihood.log_likelihood`]; errors are those of `rewards`.
        """
        rewards = self.rewards(prompts, completions, completion_ids, columns)  # (B,)
        return Evidence(rewards / self.beta, {"reward": rewards})


def check_beta(beta: float) -> float:
    """
    `beta` as a float, after checking that it makes a posterior.

    Raises:
        `TypeError`: if it is not a number.
        `ValueError`: if it is zero, negative, NaN or infinite.
    """
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real):
        raise TypeError(f"`beta` must be a positive number, got {beta!r} of type {type(beta).__name__}. Pass a float.")
    value = float(beta)
    if value == 0:
        raise ValueError(
            f"`beta` must be positive, got {beta}: without a KL term the optimum is the argmax of the reward, which "
            "is no posterior. Pass a small positive beta; `PPOConfig(beta=0)` trains towards the argmax all the same."
        )
    if not 0 < value < math.inf:
        raise ValueError(
            f"`beta` must be positive and finite, got {beta}: it is the reward that one nat of evidence is worth. To "
            "prefer low rewards, give the reward function a negative weight; for the prior itself, take the prior."
        )
    return value


def _checked_weights(weights: Sequence[float] | None, num_funcs: int) -> Tensor:
    if weights is None:
        return torch.ones(num_funcs)
    if isinstance(weights, (str, numbers.Real)):
        raise TypeError(f"`reward_weights` must be a list of numbers, got {weights!r}. Pass `[{weights}]`.")
    values = [float(weight) for weight in weights]
    if len(values) != num_funcs:
        raise ValueError(
            f"`reward_weights` must hold one weight for each of the {num_funcs} reward functions, got {len(values)}. "
            "Leave it out to weigh all alike."
        )
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"`reward_weights` must be finite, got {values}. Use 0 to leave a function out.")
    return torch.tensor(values)


def _checked_clip_range(clip_range: tuple[float, float] | None) -> tuple[float, float] | None:
    if clip_range is None:
        return None
    bounds = tuple(float(bound) for bound in clip_range)
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(
            f"`reward_clip_range` must be two numbers, low < high, got {clip_range!r}. For one bound only, pass "
            "`float('inf')` as the other."
        )
    return bounds[0], bounds[1]


def _checked_penalty(penalty: float | None, eos_token_ids: Sequence[int] | None) -> float | None:
    if penalty is None:
        return None
    if not 0 <= penalty < math.inf:
        raise ValueError(
            f"`missing_eos_penalty` must be finite and not negative, got {penalty}: it is subtracted from the reward. "
            "Pass its size, or None."
        )
    if not eos_token_ids:
        raise ValueError(
            f"`eos_token_ids` must hold the tokens that end a completion when `missing_eos_penalty` is set, got "
            f"{eos_token_ids!r}. Pass `language_model.eos_token_ids`."
        )
    return float(penalty)
