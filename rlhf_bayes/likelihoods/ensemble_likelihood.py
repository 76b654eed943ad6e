"""Several reward models as evidence, and rules for how their disagreement changes the posterior."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from rlhf_bayes.likelihoods.likelihood import Likelihood
from rlhf_bayes.likelihoods.reward_likelihood import RewardLikelihood, check_beta
from rlhf_bayes.notebook import Described
from rlhf_bayes.numerics.pooling import uses_beta
from rlhf_bayes.rewards import PooledReward, PromptCenters


@runtime_checkable
class Ensemble(Protocol):
    """
    K reward models: any object with these two attributes, for instance a `RewardEnsemble`.

    It may also have a method `member(k)` that returns the k-th model as a reward function of TRL's protocol. Then the
    likelihood of one member runs only that model.
    """

    @property
    def num_members(self) -> int:
        """The number of members, K."""
        ...

    def member_rewards(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """Reward of each completion by each member: (K, B), fp32; `-inf` forbids a completion."""
        ...


@final
class EnsembleLikelihood(Described):
    r"""
    Evidence of K reward models that were trained on the same question:

        log_likelihood(c, x)  =  pool_k r_k(c, x) / beta

    With π_k ∝ π0 · exp(r_k / beta) the posterior of member k, and Z_k(c) its normaliser:

    - `"mean"`: the geometric pool, π ∝ Π_k π_k^{1/K}. Disagreement does not matter.
    - `"pessimistic"`: −β log mean_k exp(−r_k/β), so 1/π ∝ the mean of 1/(Z_k π_k): one member's doubt suffices.
    - `"mean_minus_variance"`: mean − penalty · variance, pessimistic to second order for `penalty` = 1/(2β).
    - `"min"`: the worst member, the limit of the pessimistic rule for a small β.
    - `"marginal"`: β log mean_k exp(r_k/β). Optimistic: it is Σ_k Z_k π_k / Σ_k Z_k, the members' posteriors mixed by
      how much each would like to leave the prior, so that the member that overrates most rules.
    - `cut(generator)`: one member at random. Over draws, the mixture 1/K Σ_k π_k, in which none counts for more.

    Comparisons leave a constant per prompt open in each member, and every rule but the mean (and `cut`) changes with
    it: the members are put on a common zero under the prior first.

    Args:
        ensemble (`Ensemble`):
            The members: `num_members` and `member_rewards(prompts, completions) -> (K, B)`.
        beta (`float`):
            Units of reward per nat of evidence; positive and finite.
        rule (`str`, *optional*, defaults to `"mean"`):
            One of [`~rlhf_bayes.numerics.POOLING_RULES`].
        penalty (`float`, *optional*):
            Weight of the variance, per unit of reward, for `"mean_minus_variance"`. Default: 1 / (2 beta).
        centers (`PromptCenters` or `False`, *optional*):
            Each member's mean reward under the prior, from `prompt_centers(ensemble, prior, prompts)`. Needed for
            every rule but the mean; `False` says that the members are comparable as they are.

    Attributes:
        pooled (`PooledReward`): The same as a reward function, for a trainer.
        forbids (`bool` or `None`): `None`, because an ensemble does not say whether a member returns `-inf`. Set it to
            True for one that does.

    Raises:
        `TypeError` or `ValueError`: an argument outside of its range, or missing for the rule.

    Source: Korbak, Perez & Buckley 2022, arXiv 2205.11275, ask for evidence that knows its uncertainty; for the rules
    see [`~rlhf_bayes.numerics.pool`].
    """

    forbids: bool | None = None

    def __init__(
        self,
        ensemble: Ensemble,
        beta: float,
        rule: str = "mean",
        penalty: float | None = None,
        centers: PromptCenters | Literal[False] | None = None,
    ):
        if not isinstance(ensemble, Ensemble):
            raise TypeError(
                "`ensemble` must have `num_members` and `member_rewards(prompts, completions) -> (K, B)`, got "
                f"{type(ensemble).__name__}. For one reward model, use `RewardLikelihood`."
            )
        self.beta = check_beta(beta)
        self.ensemble = ensemble
        pool_beta = self.beta if uses_beta(rule, penalty) else None
        self.pooled = PooledReward(ensemble, rule, pool_beta, penalty, centers)

    def _facts(self) -> dict[str, Any]:
        return {"ensemble": self.ensemble, "beta": self.beta, "rule": self.pooled.rule}

    @property
    def takes_prefixes(self) -> bool:
        """Whether the members take prefixes."""
        return self.pooled.takes_prefixes

    def rewards(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        Pooled reward of each completion: (B,), fp32.

        Arguments are those of [`Likelihood.log_likelihood`]. `completion_ids` and `columns` are not read, since
        members read text.

        Raises:
            `ValueError`: if a prompt has no center, or a member's reward is nan or `+inf`.
        """
        return self.pooled.rewards(prompts, completions)

    def log_likelihood(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        Pooled reward over beta: (B,), fp32, nats, `-inf` where forbidden.

        Arguments are those of [`Likelihood.log_likelihood`]; errors are those of `rewards`.
        """
        return self.rewards(prompts, completions, completion_ids, columns) / self.beta

    def member(self, k: int) -> Likelihood:
        """
        The evidence of member k alone, r_k / beta.

        Raises:
            `IndexError`: if there is no such member.
        """
        if not 0 <= k < self.ensemble.num_members:
            raise IndexError(f"`k` must be between 0 and {self.ensemble.num_members - 1}, the members, got {k}.")
        alone: Callable[[int], Callable] | None = getattr(self.ensemble, "member", None)
        if alone is not None:
            return RewardLikelihood(alone(k), self.beta)

        def member_reward(prompts: list, completions: list, **columns: Any) -> list[float]:
            return self.ensemble.member_rewards(prompts, completions)[k].tolist()

        return RewardLikelihood(member_reward, self.beta)

    def cut(self, generator: torch.Generator | None = None) -> Likelihood:
        """
        The evidence of a member drawn uniformly, for any `rule`. Its posterior is a component of their equal mixture.

        "Cut" as in models with modules that have no feedback: unlike with `"marginal"`, the completions do not
        influence which member is right. Draw a member anew for each completion, or train one policy per draw.

        Args:
            generator (`torch.Generator`, *optional*): makes the draw reproducible.

        Source: Plummer 2015, "Cuts in Bayesian graphical models", Statistics and Computing 25.
        """
        k = torch.randint(
            self.ensemble.num_members, (), generator=generator, device=getattr(generator, "device", None)
        )
        return self.member(int(k))
