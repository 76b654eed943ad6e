"""A critic that is fitted in closed form after each rollout, on hidden states and on rewards of prefixes."""

from typing import Any, final

import torch
from torch import Tensor

from rlhf_bayes.lm.fitted_critic import FittedCritic, prefix_features, prefix_states
from rlhf_bayes.numerics.ridge import RegressionSums, ridge_fits, with_constant
from rlhf_bayes.objectives.world import World

_PENALTIES = torch.tensor([*(10.0**exponent for exponent in range(-4, 2)), torch.inf])
_DECAY = 0.95  # of the sums, from one rollout to the next: the policy, whose returns they hold, moves


@final
class RidgeCritic:
    r"""
    Forecasts the return of a whole completion from its prefix, by ridge regression on past rollouts.

        u(prompt, x_<t) = b + aᵀ·[h_t, r(x_<t), t·r(x_<t), paid_t, t, t²]  ≈  E_π[r − β·log(π/π0)(x) | x_<t]

    h_t is the policy's last hidden state, r(x_<t) the reward of the prefix where the reward functions can be asked for
    it, and paid_t = −β·Σ_{i<t} log(π/π0)(x_i) the penalty that is known already. Their coefficients are fitted, so the
    data decide how far the critic forecasts the reward to go, coefficients of 1, or the return as a whole, 0.

    The penalty is chosen by what each would have forecast of the rollouts so far, each before it was learnt from; an
    infinite one, which forecasts the mean, is among them. A forecast never uses the rollout that it is for, so the
    gradient stays unbiased with λ = 1. The critic has no weights in the policy and needs no learning rate.

    Args:
        world ([`World`]):
            The training loop, over whose processes sums are added.
    """

    def __init__(self, world: World):
        self.world = world
        self.sums: RegressionSums | None = None
        self.errors = torch.zeros(len(_PENALTIES), dtype=torch.float64)
        """(K,): for each penalty, the sum of squared errors of its forecasts, units of the reward squared."""
        self._fits: Tensor | None = None

    @property
    def explained(self) -> float:
        """Share of the variance of past returns that its forecasts explained, each made before: in [0, 1]."""
        of_mean = self.errors[-1].item()  # the error of the infinite penalty
        return 0.0 if of_mean == 0 else 1 - self.errors.min().item() / of_mean

    def states(self, hidden: Tensor) -> Tensor:
        """The part of hidden states, (N, H), that is used: (N, S) fp32."""
        return prefix_states(hidden)

    def features(self, states: Tensor, prefix_rewards: Tensor | None, paid: Tensor) -> Tensor:
        """
        The features of each prefix: (B, T, F).

        Args:
            states (`torch.Tensor`): what `states` returned, of each prefix (B, T, S).
            prefix_rewards (`torch.Tensor`, *optional*): r of the tokens before t (B, T).
            paid (`torch.Tensor`): −β·Σ_{i<t} log(π/π0)(x_i) (B, T), units of the reward.
        """
        # not a share of T, which is the longest of this batch only
        time = torch.arange(paid.size(1), device=paid.device).float().expand_as(paid)  # (B, T)
        return prefix_features(states, paid, time, prefix_rewards)

    def forecast(self, features: Tensor) -> Tensor:
        """u before each token, (B, T), units of the reward; 0 before the first rollout."""
        if self._fits is None:
            return features.new_zeros(features.shape[:-1])
        return with_constant(features) @ self._fits[int(self.errors.argmin())].to(features)

    def fitted(self, hidden_size: int) -> FittedCritic | None:
        """What it has learnt, to be kept with a policy whose hidden states have H entries; None before it has."""
        return None if self._fits is None else FittedCritic(self._fits[int(self.errors.argmin())], hidden_size)

    def learn(self, features: Tensor, returns: Tensor, mask: Tensor, policy_weights: Tensor | None = None) -> None:
        """
        Learn from a rollout whose forecasts have been made.

        Args:
            features (`torch.Tensor`): (B, T, F).
            returns (`torch.Tensor`): r − β·log(π/π0) of each completion (B,).
            mask (`torch.Tensor`): bool (B, T): tokens that the policy drew.
            policy_weights (`torch.Tensor`, *optional*): π/q of each completion (B,), where something else drew.
        """
        lengths = mask.sum(-1, keepdim=True).expand_as(mask)  # (B, T)
        rows, targets = features[mask], returns[:, None].expand_as(mask)[mask]  # (N, F), (N,)
        # a completion counts once, however many tokens it has: its tokens share one return
        weights = 1 / lengths[mask].float()
        if policy_weights is not None:
            weights = weights * policy_weights[:, None].expand_as(mask)[mask]
        if self._fits is not None:
            residuals = targets[:, None] - with_constant(rows) @ self._fits.T.to(rows)  # (N, K)
            errors = self.world.reduce((weights[:, None] * residuals.square()).sum(0))  # (K,)
            self.errors = _DECAY * self.errors + errors.double().cpu()
        sums = RegressionSums.of(rows, targets, weights)
        sums = RegressionSums(self.world.reduce(sums.gram).cpu(), self.world.reduce(sums.cross).cpu())
        self.sums = sums if self.sums is None else self.sums.plus(sums, _DECAY)
        self._fits = ridge_fits(self.sums, _PENALTIES)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        sums = {} if self.sums is None else {"gram": self.sums.gram, "cross": self.sums.cross}
        return sums | {"errors": self.errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.errors = state["errors"]
        if "gram" in state:
            self.sums = RegressionSums(state["gram"], state["cross"])
            self._fits = ridge_fits(self.sums, _PENALTIES)
