"""What the objectives of GDC share: a posterior as target, any proposal, replay, and skipped steps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rlhf_bayes.lm import CompletionScores
from rlhf_bayes.numerics import importance_ess
from rlhf_bayes.numerics.mixture import log_balance
from rlhf_bayes.objectives.batch import joined
from rlhf_bayes.objectives.gdc_batch import GatheredRollout, GDCBatch
from rlhf_bayes.objectives.objective import LossSums, Step, scored
from rlhf_bayes.objectives.posterior_metrics import (
    moments_of_all,
    posterior_metrics,
    satisfaction,
    target_metrics,
)
from rlhf_bayes.objectives.posterior_target import PosteriorTarget, TargetEstimate
from rlhf_bayes.objectives.proposal import Comparison
from rlhf_bayes.objectives.replay import ReplayBuffer
from rlhf_bayes.objectives.rollout import Rollout
from rlhf_bayes.objectives.world import World, own_rows

# the importance ESS of a single completion is 1 up to rounding
_ROUNDING = 1e-6


B = TypeVar("B", bound=GDCBatch)


class GDCObjective(ABC, Generic[B]):
    """
    Moves a policy towards a posterior with completions of any proposal. Subclasses define the loss.

    Args:
        world ([`World`]):
            The training loop.
        target ([`PosteriorTarget`]):
            The posterior.
        replay ([`ReplayBuffer`]):
            The rollouts from which a step draws its completions.
        ess_min (`float`, *optional*, defaults to `1.0`):
            Steps whose weights p/q have a smaller effective sample size are skipped.
        comparison ([`Comparison`], *optional*):
            Compares the policy with the proposal, where that is an earlier policy.
    """

    batch_type: type[B]
    states = None  # it has no critic, which would read hidden states

    def __init__(
        self,
        world: World,
        target: PosteriorTarget,
        replay: ReplayBuffer[B],
        *,
        ess_min: float = 1.0,
        comparison: Comparison | None = None,
    ):
        self.world, self.target, self.replay, self.ess_min = world, target, replay, ess_min
        self.comparison = comparison

    @property
    def beta(self) -> float:
        """β, units of reward per nat of evidence."""
        return self.target.beta

    @property
    def replays(self) -> bool:
        """Whether a step learns from other completions than those of the last rollout."""
        return self.replay.capacity > 1

    def batch(self, rollout: Rollout) -> B:
        """The batch of a rollout. Its completions update the estimate of Z, and its metrics are logged."""
        log_policy = rollout.token_log_probs.sum(-1)  # (B,)
        log_prior = rollout.ref_token_log_probs.sum(-1)
        log_likelihood = rollout.rewards / self.beta
        kls = log_policy - log_prior if rollout.token_kl is None else rollout.token_kl.sum(-1)
        local = torch.stack([log_policy, log_prior, rollout.log_proposal, log_likelihood, kls], dim=-1)
        # a few numbers a completion: on the host, no statistic of them makes it wait for the device again
        keys, numbers = (self.world.gather(column).cpu() for column in (rollout.prompt_keys, local))
        everyone = GatheredRollout(keys, *numbers.double().unbind(-1))
        estimate = self.target.estimate(
            everyone.prompt_keys, everyone.log_prior, everyone.log_proposal, everyone.log_likelihood
        )
        columns = {"log_z": estimate.log_z.float()} | self.columns(rollout, everyone, estimate)
        own: dict[str, Any] = {
            name: own_rows(self.world, column).to(log_policy.device, non_blocking=True)
            for name, column in columns.items()
        }
        batch = self.batch_type(
            **rollout.sequences,
            prompt_keys=rollout.prompt_keys,
            log_policy=log_policy,
            log_prior=log_prior,
            log_proposal=rollout.log_proposal,
            log_likelihood=log_likelihood,
            **own,
        )
        self._report_rollout(rollout, everyone, estimate)
        if self.comparison is not None and rollout.drawn_from == "snapshot":
            self.comparison.add(estimate.log_target, everyone.log_policy, everyone.log_proposal)
        return batch

    def with_stored(self, batch: B, stored: Rollout, drawn_by_prior: bool) -> B:
        r"""
        A batch of the policy's completions, and stored ones, as one batch.

        Where the prior drew what is stored, each completion is weighted as a draw of the mixture of what drew them:

            q = (n·π + m·π0)/(n + m)    for n completions of the policy and m stored ones

        Where something else did, whose density at the policy's completions is not known, each by its own q. Z is
        estimated from the policy's completions, and from those of the store only once: see [`know_stored`].

        Args:
            batch ([`GDCBatch`]): Of completions that the policy has drawn.
            stored ([`Rollout`]): Stored completions of other prompts, chosen at random, as they are scored now.
            drawn_by_prior (`bool`): Whether the prior drew them.

        Source: the balance heuristic, Veach & Guibas 1995.
        """
        local = (stored.token_log_probs.sum(-1), stored.ref_token_log_probs.sum(-1), stored.log_proposal)
        log_likelihood, log_z = stored.rewards / self.beta, self.target.log_z(stored.prompt_keys)
        numbers = torch.stack([*local, log_likelihood, local[0] - local[1], log_z], dim=-1).cpu().double()
        whole = GatheredRollout(stored.prompt_keys.cpu(), *numbers[:, :5].unbind(-1))
        log_target = self.target.log_target(whole.log_prior, whole.log_likelihood, numbers[:, 5])
        columns = self.columns(stored, whole, TargetEstimate(log_target, numbers[:, 5], numbers[:, 5]))
        own: dict[str, Any] = {name: column.to(log_z.device, non_blocking=True) for name, column in columns.items()}
        other = self.batch_type(
            **stored.sequences,
            prompt_keys=stored.prompt_keys,
            log_policy=local[0],
            log_prior=local[1],
            log_proposal=local[2],
            log_likelihood=log_likelihood,
            log_z=log_z,
            **own,
        )
        parts = [batch, other]
        if drawn_by_prior:
            counts = [len(part) for part in parts]
            parts = [
                replace(part, log_proposal=log_balance(torch.stack([part.log_policy, part.log_prior]), counts).float())
                for part in parts
            ]
        return joined(parts)

    def know_stored(self, prompt_keys: Tensor, log_ratios: Tensor, log_likelihood: Tensor) -> None:
        """
        Estimate Z from the completions of a store, before any other. Call it once.

        Args:
            prompt_keys (`Tensor` (N,)): As in a rollout.
            log_ratios, log_likelihood (`Tensor` (N,)): log π0 − log q and the evidence, nats.
        """
        self.target.normalizers.estimate(prompt_keys, log_ratios, log_likelihood, keep=True)

    @abstractmethod
    def columns(self, rollout: Rollout, everyone: GatheredRollout, estimate: TargetEstimate) -> dict[str, Tensor]:
        """The fields that `batch_type` adds to [`GDCBatch`], for all processes' completions: name -> (B_global,)."""

    def step(self, batches: Sequence[B], new_rollout: Sequence[B] | None) -> Step[B]:
        """Completions of the replayed rollouts, or the rollout's own, with the current estimate of Z."""
        if self.replays:
            if new_rollout is not None:
                self.replay.add(new_rollout)
            batches = [
                replace(batch, log_z=self.target.log_z(batch.prompt_keys))
                for batch in self.replay.sample([len(batch) for batch in batches])
            ]
        ess = self._step_ess(batches)
        skipped = ess < self.ess_min - _ROUNDING
        self.world.log("gdc/step_ess", ess)
        self.world.log("gdc/skipped_steps", float(skipped))
        return Step(batches, skipped)

    def count(self, batch: B) -> Tensor:
        """Number of completions to which evidence applies: ()."""
        return (~batch.log_likelihood.isnan()).sum()

    @abstractmethod
    def loss(self, scores: CompletionScores, batch: B) -> LossSums:
        """The loss, summed over completions."""

    @abstractmethod
    def evaluation_loss(self, batch: B) -> LossSums:
        """The loss of the policy that drew the batch."""

    def report(self, totals: dict[str, float]) -> None:
        """Log the entropy (nats per token) and the effective sample size of π/q (share) of a step."""
        self.world.log("entropy", totals["entropy"] / max(totals["tokens"], 1.0))
        ess = totals["ratios"] ** 2 / max(totals["squares"], 1e-30)
        self.world.log("gdc/ratio_ess", ess / totals["rows"])

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        comparison = {} if self.comparison is None else {"comparison": self.comparison.sums}
        return self.target.state_dict() | {"replay": self.replay.state_dict()} | comparison

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises ValueError if it belongs to another posterior."""
        self.target.load_state_dict(state)
        self.replay.load_state_dict(state["replay"], self.batch_type)
        if self.comparison is not None:
            self.comparison.sums = state["comparison"].cpu()

    def sums_to_report(self, scores: CompletionScores, batch: B) -> dict[str, Tensor]:
        """The sums of a batch that `report` needs: name -> ()."""
        mask = batch.policy_tokens
        log_probs, entropy = scored(scores, batch.policy_mask)
        ratio = (log_probs.sum(-1) - batch.log_proposal).exp()  # (B,)
        columns = {
            "entropy": torch.where(mask, entropy, 0.0),
            "tokens": mask.float(),
            "ratios": ratio,
            "squares": ratio.square(),
            "rows": torch.ones_like(ratio),
        }
        return {name: column.detach().sum() for name, column in columns.items()}

    def _step_ess(self, batches: Sequence[B]) -> float:
        """Effective sample size of the weights p/q of a step, over all processes."""
        names = ("log_prior", "log_likelihood", "log_z", "log_proposal")
        columns = torch.stack([torch.cat([getattr(batch, name) for batch in batches]) for name in names], dim=-1)
        log_prior, log_likelihood, log_z, log_proposal = self.world.gather(columns).cpu().double().unbind(-1)
        log_weights = self.target.log_target(log_prior, log_likelihood, log_z) - log_proposal  # (M_global,)
        return importance_ess(torch.where(log_weights.isnan(), -torch.inf, log_weights)).item()

    def _report_rollout(self, rollout: Rollout, everyone: GatheredRollout, estimate: TargetEstimate) -> None:
        log_zs, power = estimate.pooled_log_z, self.target.power
        metrics = {"gdc/beta": self.beta / power}
        metrics["posterior/skipped_prompts"] = (log_zs == -torch.inf).double().mean().item()
        if log_zs.isfinite().any():
            metrics["posterior/log_z"] = log_zs[log_zs.isfinite()].mean().item()
        metrics |= target_metrics(
            estimate.log_target, everyone.log_policy, everyone.log_proposal, everyone.prompt_keys
        )
        log_ratios, kls, weights = everyone.log_policy - everyone.log_prior, everyone.kls, None
        if rollout.drawn_from != "policy":
            weights = (everyone.log_policy - everyone.log_proposal).exp()
        if rollout.drawn_from not in ("policy", "engine"):
            kls = log_ratios  # sums of exact token KLs estimate the KL only for prefixes that the policy drew
        evidence = power * everyone.log_likelihood
        metrics |= posterior_metrics(evidence, log_ratios, kls, 1.0, rollout.num_generations, log_zs, weights)
        metrics |= moments_of_all(self.world, rollout, weights)
        if self.target.forbids:
            metrics["posterior/satisfaction"] = satisfaction(everyone.log_likelihood, weights)
        for name, value in metrics.items():
            self.world.log(name, value)
