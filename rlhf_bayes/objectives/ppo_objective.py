"""PPO with its critic: the clipped policy gradient of E[r] − β·KL(π‖π0), and the value loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from rlhf_bayes.lm import CompletionScores
from rlhf_bayes.numerics import k1
from rlhf_bayes.numerics.masked import masked_sum
from rlhf_bayes.numerics.ppo import (
    adapted_beta,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    kl_penalised_advantages,
    prompt_baseline,
)
from rlhf_bayes.objectives.batch import Batch
from rlhf_bayes.objectives.objective import LossSums, Step, scored
from rlhf_bayes.objectives.posterior_metrics import moments_of_all, posterior_metrics
from rlhf_bayes.objectives.posterior_target import check_same_beta
from rlhf_bayes.objectives.ridge_critic import RidgeCritic
from rlhf_bayes.objectives.rollout import Rollout
from rlhf_bayes.objectives.world import World, own_rows

_MOST_TRUST = 0.1  # 1 − λ for a critic that explains everything


@dataclass(frozen=True)
class PPOBatch(Batch):
    """The batch of PPO. Log-probs are in nats, rewards and values in units of the reward; padding is 0."""

    loss_mask: Tensor
    """(B, T) bool: tokens that the policy drew, of completions to which a reward function applies."""
    rewards: Tensor
    """(B,): r; 0 where no reward function applies."""
    old_token_log_probs: Tensor
    """(B, T): log π of each token when it was drawn."""
    ref_token_log_probs: Tensor
    """(B, T): log π0 of each token."""
    old_values: Tensor
    """(B, T): the critic's forecasts u when the completions were drawn."""
    token_entropy: Tensor
    """(B, T): entropy of π(· | prefix) when the completions were drawn."""
    value_shift: Tensor
    """(B,): correction of the critic's forecast for the prompt, from the completion's siblings."""
    advantage_shift: Tensor
    """(): mean of the advantages of the rollout, or 0 where they are not normalised."""
    advantage_scale: Tensor
    """(): standard deviation of these advantages, or 1."""
    beta: Tensor
    """(): β of the rollout."""
    lam: Tensor
    """(): λ of the rollout."""
    policy_weights: Tensor | None = None
    """(B,): π_old/q of each completion, where an engine drew with log-probs q of its own; None where π_old drew."""


@final
class PPOObjective:
    r"""
    Proximal policy optimisation of J(θ) = E_πθ[r] − β·KL(πθ‖π0), whose optimum is the posterior.

        loss = Σ_tokens w·[max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε)) + vf_coef·(V − target)²/2],    ρ = π/π_old

    w is π_old(x)/q(x) of the completion, where q is what drew it, and 1 where that is the policy itself. π_old, around
    which the ratio is clipped, is the policy as the trainer scores it; q is the behaviour policy, for instance an
    engine with other arithmetic. The weight is that of the whole completion, since each advantage holds rewards of
    tokens that q drew later. So the gradient is that of J whatever drew.

    The advantages are [`~rlhf_bayes.numerics.ppo.kl_penalised_advantages`], computed anew at each update with the
    policy and the critic of that moment, since the posterior does not move.

    Args:
        world ([`World`]):
            The training loop.
        beta (`float`):
            β, units of reward per nat.
        lam (`float`, *optional*):
            λ of generalised advantage estimation. Default: 1 − s/10 with a [`RidgeCritic`] that has explained the
            share s of the variance of past returns, else 1.
        epsilon_low, epsilon_high (`float`, *optional*, defaults to `0.2`):
            The ratio is clipped to [1 − epsilon_low, 1 + epsilon_high].
        cliprange_value (`float`, *optional*):
            Upper bound on the change of a value since the rollout, units of the reward.
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss.
        normalize_advantages (`bool`, *optional*, defaults to `False`):
            Whether the advantages of a rollout are given mean 0 and variance 1.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps at the start in which only the critic learns.
        target_kl (`float`, *optional*):
            KL(π‖π0), nats per sequence, to which β adapts. Default: β is fixed.
        kl_horizon (`int`, *optional*, defaults to `10_000`):
            Completions over which a KL far from `target_kl` changes β by a fifth.
        critic ([`RidgeCritic`], *optional*):
            A critic that is fitted after each rollout, in place of one in the policy. There is no value loss then.

    Source: Schulman et al. 2017, arXiv 1707.06347; the KL penalty: Ziegler et al. 2019, 1909.08593; the optimum:
    Korbak, Perez & Buckley 2022, 2205.11275, equations 3 to 7; proximal and behaviour policy apart: Hilton, Cobbe &
    Schulman 2022, 2110.00641.
    """

    batch_type = PPOBatch
    replays = False

    def __init__(
        self,
        world: World,
        *,
        beta: float,
        lam: float | None = None,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        cliprange_value: float | None = None,
        vf_coef: float = 0.1,
        normalize_advantages: bool = False,
        critic_warmup_steps: int = 0,
        target_kl: float | None = None,
        kl_horizon: int = 10_000,
        critic: RidgeCritic | None = None,
    ):
        self.world, self.beta, self.lam = world, beta, lam
        self.epsilon_low, self.epsilon_high, self.cliprange_value = epsilon_low, epsilon_high, cliprange_value
        self.vf_coef, self.normalize_advantages = vf_coef, normalize_advantages
        self.critic_warmup_steps = critic_warmup_steps
        self.target_kl, self.kl_horizon = target_kl, kl_horizon
        self.critic = critic

    @property
    def states(self) -> Callable[[Tensor], Tensor] | None:
        """What of the hidden states a rollout must hold, if the critic reads them: (N, H) -> (N, S)."""
        return None if self.critic is None else self.critic.states

    @property
    def critic_warms_up(self) -> bool:
        """Whether only the critic learns in the current step."""
        return self.world.training and self.world.step < self.critic_warmup_steps

    def batch(self, rollout: Rollout) -> PPOBatch:
        """The rollout with everything that its advantages need. It logs metrics, and adapts β to `target_kl`."""
        critic = self.critic
        features = None if critic is None else self._features(critic, rollout)
        values = _valued(rollout.values) if features is None or critic is None else critic.forecast(features)  # (B, T)
        mask = rollout.policy_tokens & ~rollout.rewards.isnan()[:, None]
        lam = self._lam()
        numbers = {"advantage_shift": 0.0, "advantage_scale": 1.0, "beta": self.beta, "lam": lam}
        constants: dict[str, Any] = {name: rollout.rewards.new_full((), value) for name, value in numbers.items()}
        batch = PPOBatch(
            **rollout.sequences,
            loss_mask=mask,
            rewards=rollout.rewards.nan_to_num(0.0),
            old_token_log_probs=rollout.token_log_probs,
            ref_token_log_probs=rollout.ref_token_log_probs,
            old_values=values,
            token_entropy=rollout.token_entropy,
            value_shift=self._value_shift(rollout, values),
            **constants,
            policy_weights=rollout.policy_weights,
        )
        advantages, targets = self._advantages(rollout.token_log_probs, values, batch)
        if self.normalize_advantages:
            batch = self._normalised(batch, advantages)
        columns = torch.stack([values, targets, mask.float()], dim=1)  # (B, 3, T)
        forecasts, targets, tokens = self.world.gather_tokens(columns).unbind(1)
        self.world.log("ppo/explained_variance", explained_variance(forecasts, targets, tokens.bool()).item())
        self.world.log("ppo/lam", lam)
        if features is not None and critic is not None and self.world.training:
            critic.learn(features, self._returns(rollout), mask, rollout.policy_weights)
        self._report_rollout(rollout)
        return batch

    def step(self, batches: Sequence[PPOBatch], new_rollout: Sequence[PPOBatch] | None) -> Step[PPOBatch]:
        """The rollout's own micro-batches."""
        return Step(batches)

    def count(self, batch: PPOBatch) -> Tensor:
        """Number of tokens: ()."""
        return batch.loss_mask.sum()

    def loss(self, scores: CompletionScores, batch: PPOBatch) -> LossSums:
        """Policy and value loss, summed over tokens."""
        mask = batch.loss_mask  # (B, T)
        log_probs = scored(scores, batch.policy_mask)[0]  # (B, T)
        values = _valued(scores.values) if self.critic is None else batch.old_values  # (B, T)
        advantages, targets = self._advantages(log_probs.detach(), values.detach(), batch)
        advantages = (advantages - batch.advantage_shift) / batch.advantage_scale
        # padding is set to 0 before exp, since its log-probs belong to no token and their ratio could overflow
        log_ratio = torch.where(mask, log_probs - batch.old_token_log_probs, 0.0)
        policy_loss = clipped_policy_loss(log_ratio, advantages, self.epsilon_low, self.epsilon_high)
        value_loss = clipped_value_loss(values, batch.old_values, targets, self.cliprange_value)
        if batch.policy_weights is not None:
            policy_loss, value_loss = (batch.policy_weights[:, None] * loss for loss in (policy_loss, value_loss))
        policy_weight = 0.0 if self.critic_warms_up else 1.0
        value_weight = self.vf_coef if self.critic is None else 0.0
        loss = policy_weight * masked_sum(policy_loss, mask) + value_weight * masked_sum(value_loss, mask)
        columns = self._columns_to_report(scores, values, log_ratio, advantages, batch)
        columns |= {"ppo/policy_loss": policy_loss, "ppo/value_loss": value_loss}
        sums = {name: masked_sum(column.detach(), mask) for name, column in columns.items()}
        return LossSums(loss, sums | {"tokens": mask.sum().float()})

    def evaluation_loss(self, batch: PPOBatch) -> LossSums:
        """The loss of the policy and the critic that drew the batch."""
        scores = CompletionScores(batch.old_token_log_probs, batch.token_entropy, batch.old_values, None)
        return self.loss(scores, batch)

    def report(self, totals: dict[str, float]) -> None:
        """Log means over the tokens of a step."""
        tokens = max(totals.pop("tokens"), 1.0)
        for name, total in totals.items():
            self.world.log(name, total / tokens)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: β, which may have adapted, and what a critic that is fitted has learnt."""
        return {"beta": self.beta} | ({} if self.critic is None else {"critic": self.critic.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned. Raises ValueError if β is another and is not adapted."""
        if self.target_kl is None:
            check_same_beta(self.beta, state["beta"])
        self.beta = state["beta"]
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])

    def _advantages(self, log_probs: Tensor, values: Tensor, batch: PPOBatch) -> tuple[Tensor, Tensor]:
        log_ratios = k1(log_probs, batch.ref_token_log_probs)  # (B, T)
        values = values + batch.value_shift[:, None]
        return kl_penalised_advantages(batch.rewards, log_ratios, values, batch.loss_mask, batch.beta, batch.lam)

    def _lam(self) -> float:
        if self.lam is not None:
            return self.lam
        # λ < 1 puts the critic's forecast in place of later rewards: less noise, but the critic's errors
        return 1.0 if self.critic is None else 1.0 - _MOST_TRUST * self.critic.explained

    def _features(self, critic: RidgeCritic, rollout: Rollout) -> Tensor:
        """What the critic reads of each prefix: (B, T, F)."""
        if rollout.states is None:
            raise ValueError(
                "`rollout` must hold `states` for a `RidgeCritic`, got None: keep `objective.states(...)`."
            )
        log_ratios = k1(rollout.token_log_probs, rollout.ref_token_log_probs)  # (B, T)
        paid = -self.beta * (log_ratios.cumsum(-1) - log_ratios)  # (B, T)
        return critic.features(rollout.states, rollout.prefix_rewards, paid)

    def _returns(self, rollout: Rollout) -> Tensor:
        """r − β·log(π/π0) of each completion: (B,)."""
        log_ratios = k1(rollout.token_log_probs, rollout.ref_token_log_probs).sum(-1)  # (B,)
        return rollout.rewards.nan_to_num(0.0) - self.beta * log_ratios

    def _value_shift(self, rollout: Rollout, values: Tensor) -> Tensor:
        forecasts = values[:, 0]  # (B,): before the first token, so a function of the prompt
        columns = torch.stack([self._returns(rollout), forecasts], dim=-1)
        returns, everyones_forecasts = self.world.gather(columns).unbind(-1)  # (B_global,)
        baselines = prompt_baseline(returns, everyones_forecasts, rollout.num_generations)
        return own_rows(self.world, baselines) - forecasts

    def _normalised(self, batch: PPOBatch, advantages: Tensor) -> PPOBatch:
        # the mean and the variance are over the tokens of all processes
        mask = batch.loss_mask
        local = torch.stack([masked_sum(x, mask) for x in (torch.ones_like(advantages), advantages, advantages**2)])
        count, total, squares = self.world.reduce(local)
        mean = total / count.clamp(min=1.0)
        spread = (squares / count.clamp(min=1.0) - mean**2).clamp(min=0.0).sqrt() + 1e-4  # 1e-4 as in RLOO
        return replace(batch, advantage_shift=mean, advantage_scale=spread)

    def _report_rollout(self, rollout: Rollout) -> None:
        log_ratios = k1(rollout.token_log_probs, rollout.ref_token_log_probs)  # (B, T), 0 on padding
        kls = log_ratios if rollout.token_kl is None else rollout.token_kl  # (B, T), 0 on padding
        local = torch.stack([rollout.rewards, log_ratios.sum(-1), kls.sum(-1)], dim=-1)  # (B, 3)
        # on the host, no statistic of them makes it wait for the device again
        rewards, log_ratios, kls = self.world.gather(local).cpu().unbind(-1)  # (B_global,)
        weights = None if rollout.policy_weights is None else self.world.gather(rollout.policy_weights).cpu()
        metrics = posterior_metrics(
            rewards, log_ratios, kls, self.beta, rollout.num_generations, weights=weights
        ) | moments_of_all(self.world, rollout, weights)
        for name, value in metrics.items():
            self.world.log(name, value)
        self.world.log("ppo/beta", self.beta)
        if self.world.training and self.target_kl is not None:
            kl = metrics["posterior/kl_to_prior"]
            self.beta = adapted_beta(self.beta, kl, self.target_kl, len(kls), self.kl_horizon)

    def _columns_to_report(
        self, scores: CompletionScores, values: Tensor, log_ratio: Tensor, advantages: Tensor, batch: PPOBatch
    ) -> dict[str, Tensor]:
        """Metric -> its values at each token, (B, T)."""
        ratio = log_ratio.detach().exp()
        low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
        moved = (values.detach() - batch.old_values).abs()
        clip = self.cliprange_value
        return {
            "entropy": scored(scores, batch.policy_mask)[1],
            "ppo/approx_kl": ratio - 1 - log_ratio,
            "ppo/value_clip_fraction": torch.zeros_like(moved) if clip is None else (moved > clip).float(),
            "clip_ratio/low_mean": low.float(),
            "clip_ratio/high_mean": high.float(),
            "clip_ratio/region_mean": (low | high).float(),
        }


def _valued(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError(
            "PPO needs the critic's values, got None: put a `Critic` into the model, and score with it in the forward."
        )
    return values
