"""Completions of the prior, with what they say of the posterior that a training is asked for."""

import math
from typing import Any, NamedTuple, final

import torch
from scipy.stats import norm, ttest_ind
from torch import Tensor

from rlhf_bayes.numerics import importance_ess, log_z, what_if
from rlhf_bayes.numerics.groups import grouped
from rlhf_bayes.numerics.log_weights import MIN_DRAWS, MIN_IMPORTANCE_ESS, pooled_khat, weights_suffice
from rlhf_bayes.objectives.posterior_metrics import log_z_without_bias

_MAX_DRAWS = 100_000
_MIN_PROMPTS = 4  # for a test over prompts
_FACTORS = tuple(2.0**power for power in range(8, -1, -1))  # larger β ask for less


class ByPrompt(NamedTuple):
    """An estimate for each of P prompts."""

    keys: Tensor
    """(P,): keys of the prompts, ascending."""
    mean: Tensor
    """(P,): the estimates."""
    variance: Tensor
    """(P,): their variances over the draws; nan for a single draw."""

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> "ByPrompt":
        """Means of the values (n,) of each prompt, whose keys are (n,)."""
        layout = grouped(keys)
        means = layout.table(values, torch.nan).nanmean(-1)  # (P,)
        squares = layout.table((values - means[layout.row]).square(), torch.nan).nansum(-1)
        sizes = layout.sizes
        return cls(keys.unique(), means, torch.where(sizes > 1, squares / (sizes - 1).clamp(min=1) / sizes, torch.nan))

    def __str__(self) -> str:
        error = self.mean.std().item() / math.sqrt(len(self.mean)) if len(self.mean) > 1 else math.nan
        if math.isnan(error):
            error = self.variance.sum().sqrt().item()
        return f"{self.mean.mean():.2f} ± {error:.2f}".replace("-", "−")

    def scaled(self, factor: float) -> "ByPrompt":
        """The estimates times a factor."""
        return ByPrompt(self.keys, factor * self.mean, factor**2 * self.variance)

    def is_below(self, other: "ByPrompt", chance: float) -> bool:
        """
        Whether the mean over prompts is below the other's by more than chance.

        Where the other has all of these prompts, they are compared prompt by prompt, with the errors of the draws;
        otherwise by Welch's t-test over prompts.

        Args:
            other ([`ByPrompt`]):
                Estimates for these or other prompts.
            chance (`float`):
                Probability of a false answer.
        """
        if not (self.mean.isfinite().all() and other.mean.isfinite().all()):
            return False
        if bool(torch.isin(self.keys, other.keys).all()):
            place = torch.searchsorted(other.keys, self.keys)
            difference, variance = self.mean - other.mean[place], self.variance + other.variance[place]
            if bool(variance.isfinite().all()):
                error = variance.sum().sqrt().item()
                return error > 0 and norm.cdf(difference.sum().item() / error) < chance
        if min(len(self.mean), len(other.mean)) < _MIN_PROMPTS:
            return False
        test = ttest_ind(self.mean.numpy(), other.mean.numpy(), equal_var=False, alternative="less")
        return bool(test.pvalue < chance)


@final
class PriorDraws:
    """Rewards and log-probabilities of completions that the prior drew, by prompt. The first 100,000 are kept."""

    def __init__(self):
        self._keys = torch.empty(0, dtype=torch.long)
        self._rewards = torch.empty(0, dtype=torch.float64)
        self._log_prior = torch.empty(0, dtype=torch.float64)
        # β and what was computed of it, since that goes over all draws
        self._entropies: tuple[float, ByPrompt | None] | None = None
        self._distances: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, keys: Tensor, rewards: Tensor, log_prior: Tensor) -> None:
        """
        Keep these completions.

        Args:
            keys (`Tensor` (n,)):
                Integers, equal for completions of a prompt.
            rewards (`Tensor` (n,)):
                r, `-inf` where forbidden.
            log_prior (`Tensor` (n,)):
                log π0, nats.
        """
        room = _MAX_DRAWS - len(self)
        if room > 0:
            self._keys = torch.cat([self._keys, keys[:room]])
            self._rewards = torch.cat([self._rewards, rewards[:room]])
            self._log_prior = torch.cat([self._log_prior, log_prior[:room]])
            self._entropies = self._distances = None

    def rewards_of_prompts(self) -> Tensor:
        """Rewards in a row for each prompt, as many as every prompt has: (P, n)."""
        rows = self._rows()
        return self._rewards[rows]

    def mean_rewards(self) -> ByPrompt | None:
        """E_π0[r]; `-inf` where a completion is forbidden, None where there are no draws."""
        return ByPrompt.of(self._keys, self._rewards) if len(self) else None

    def distance(self, beta: float) -> float:
        """
        KL(π0‖π*), nats; 1 where there are too few draws to say, or no posterior.

        It is infinite where evidence forbids completions, and KL(π*‖π0) then stands in its place.

        Args:
            beta (`float`):
                β, units of reward per nat.
        """
        if self._distances is None or self._distances[0] != beta:
            self._distances = beta, self._distance(beta)
        return self._distances[1]

    def _distance(self, beta: float) -> float:
        rewards = self.rewards_of_prompts() if len(self) else torch.empty(0, 0)
        if beta <= 0 or rewards.size(1) < 2:
            return 1.0
        evidence = rewards / beta  # (P, n)
        if bool(evidence.isfinite().all()):
            found = (log_z_without_bias(evidence) - evidence.mean(-1)).mean().item()
        else:
            found = what_if(rewards, [beta])[0].kl_to_prior
        return found if 0 < found < math.inf else 1.0

    def posterior_entropies(self, beta: float) -> ByPrompt | None:
        r"""
        Entropy of the posterior, nats; None where the draws do not suffice for it.

            H(π*) = log Z − E_π*[r/β + log π0],    by reweighting the draws

        The variance is that of the delta method.

        Args:
            beta (`float`):
                β, units of reward per nat.
        """
        if self._entropies is None or self._entropies[0] != beta:
            self._entropies = beta, self._posterior_entropies(beta)
        return self._entropies[1]

    def _posterior_entropies(self, beta: float) -> ByPrompt | None:
        if len(self) == 0:
            return None
        rows = self._rows()
        if rows.size(1) < MIN_DRAWS:
            return None
        evidence, log_prior = self._rewards[rows] / beta, self._log_prior[rows]  # (P, n)
        if not weights_suffice(importance_ess(evidence), pooled_khat(evidence), rows.size(1)):
            return None
        n = rows.size(1)
        weights = n * evidence.softmax(-1)  # (P, n), with a mean of 1
        log_density = torch.where(weights > 0, evidence + log_prior, 0.0)
        mean = (weights * log_density).mean(-1, keepdim=True)  # (P, 1)
        influence = weights - 1 - weights * (log_density - mean)
        return ByPrompt(self._keys.unique(), log_z(evidence) - mean.squeeze(-1), influence.square().mean(-1) / n)

    def _rows(self) -> Tensor:
        """Positions of the draws of each prompt, as many as every prompt has: (P, n)."""
        positions = grouped(self._keys).table(torch.arange(len(self), dtype=torch.float64), torch.nan)  # (P, most)
        least = int((~positions.isnan()).sum(-1).min())
        return positions.sort(-1).values[:, :least].long()  # nan comes last

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"keys": self._keys, "rewards": self._rewards, "log_prior": self._log_prior}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._keys, self._rewards, self._log_prior = state["keys"], state["rewards"], state["log_prior"]
        self._entropies = self._distances = None


def what_is_asked_for(rewards: Tensor, beta: float, is_reward: bool) -> str:
    """
    What β asks for, whether the distance to its posterior can be measured, and what would do, in a few sentences.

    Args:
        rewards (`Tensor` (P, n)):
            Rewards of completions of the prior, in the order of the prompts.
        beta (`float`):
            β, above 0.
        is_reward (`bool`):
            Whether the evidence is a reward with a β, rather than a likelihood in nats.
    """
    num_prompts, n = rewards.shape
    rows = what_if(rewards, [beta * factor for factor in _FACTORS] if is_reward else [beta])
    asked = next(row for row in rows if row.beta == beta)
    posterior = f"The posterior at β = {beta:g}" if is_reward else "The posterior"
    count = (
        f"of {n} draws of the prior for each of {num_prompts} prompts, {asked.importance_ess:.1f} count, for the "
        "prompt with the fewest (ESS)"
    )
    needed = max(MIN_DRAWS, math.ceil(1.5 * MIN_IMPORTANCE_ESS * n / max(asked.importance_ess, 1e-9)))
    if asked.importance_ess == 0:
        return f"{posterior} allows none of the {n} draws of the prior for some prompt: {_RARE}"
    if asked.trustworthy:
        moved = f"{asked.kl_to_prior:.2f} ± {asked.kl_to_prior_standard_error:.2f} nats from the prior"
        reward = ""
        if is_reward:
            before = rewards[rewards.isfinite()].mean().item()
            after = f"{asked.reward:.3g} ± {asked.reward_standard_error:.2g}"
            reward = f" It has a reward of {after}; the prior's is {before:.3g}."
        return (
            f"{posterior} is {moved}: {count}.{reward} How far a policy is from it can be measured with {needed} "
            "completions a prompt."
        )
    text = (
        f"{posterior} is at least {asked.kl_to_prior_at_least:.2f} nats from the prior: {count}. How far a policy is "
        f"from it cannot be measured with so few; at least {max(needed, n + 1):,} completions a prompt would be needed"
    )
    closer = [row for row in rows if row.trustworthy]
    if closer:
        best = closer[-1]
        text += (
            f", or β = {best.beta:.2g}, which {n} can measure: {best.kl_to_prior:.2f} nats from the prior, reward "
            f"{best.reward:.3g}"
        )
    return f"{text}. Until then only bounds are known, and the gain over the prior."


_RARE = (
    "it is rare or impossible. Training needs completions that it allows: draw more of them a prompt, or ask for less "
    "at first."
)
