"""Distributional policy gradients: any f-divergence from the posterior to the policy."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from rlhf_bayes.lm import CompletionScores
from rlhf_bayes.numerics.dpg import default_baseline, dpg_advantages, dpg_baselines
from rlhf_bayes.numerics.f_divergence import f_divergence_terms
from rlhf_bayes.objectives.gdc_batch import GatheredRollout, GDCBatch
from rlhf_bayes.objectives.gdc_objective import GDCObjective
from rlhf_bayes.objectives.objective import LossSums, scored
from rlhf_bayes.objectives.posterior_target import PosteriorTarget, TargetEstimate
from rlhf_bayes.objectives.proposal import Comparison
from rlhf_bayes.objectives.replay import ReplayBuffer
from rlhf_bayes.objectives.rollout import Rollout
from rlhf_bayes.objectives.world import World


@dataclass(frozen=True)
class FDivergenceBatch(GDCBatch):
    """The batch of a distributional policy gradient."""

    baseline: Tensor
    """(B,): b of the pseudo-reward; 0 in evaluation."""


@final
class FDivergenceObjective(GDCObjective[FDivergenceBatch]):
    r"""
    Distributional policy gradients of an f-divergence from the posterior p to the policy π.

        loss = −Σ_i A_i·log π(x_i),    A = π/q·(−f′(π/p) − b),    whose gradient is that of D_f(π‖p)

    Args:
        world, target, replay, ess_min, comparison:
            As in [`GDCObjective`].
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            One of [`~rlhf_bayes.numerics.DIVERGENCES`].
        alpha (`float`, *optional*):
            α of the divergence `"alpha"`.
        baseline (`str`, *optional*):
            b, as in [`~rlhf_bayes.numerics.dpg.dpg_baselines`]. Default: that of the divergence's record.
        max_pseudo_reward (`float`, *optional*):
            Upper bound of −f′. Where it takes effect, it moves the optimum.

    Source: Go et al. 2023, arXiv 2302.08215; baselines: Korbak et al. 2022, 2206.00761.
    """

    batch_type = FDivergenceBatch

    def __init__(
        self,
        world: World,
        target: PosteriorTarget,
        replay: ReplayBuffer[FDivergenceBatch],
        *,
        divergence: str = "forward_kl",
        alpha: float | None = None,
        baseline: str | None = None,
        max_pseudo_reward: float | None = None,
        ess_min: float = 1.0,
        comparison: Comparison | None = None,
    ):
        super().__init__(world, target, replay, ess_min=ess_min, comparison=comparison)
        self.divergence, self.alpha, self.baseline = divergence, alpha, baseline
        self.max_pseudo_reward = max_pseudo_reward

    def columns(self, rollout: Rollout, everyone: GatheredRollout, estimate: TargetEstimate) -> dict[str, Tensor]:
        """The baseline of each completion."""
        if not self.world.training:
            return {"baseline": torch.zeros_like(everyone.log_policy).float()}
        kind = self.baseline or default_baseline(self.divergence, self.alpha, rollout.num_generations)
        columns = (estimate.log_target, everyone.log_policy, everyone.log_proposal, everyone.prompt_keys)
        return {"baseline": dpg_baselines(*columns, self.divergence, self.alpha, kind).float()}

    def count(self, batch: FDivergenceBatch) -> Tensor:
        """Number of completions to which evidence applies; in evaluation, of those whose Z is known too: ()."""
        counted = ~batch.log_likelihood.isnan()
        return (counted if self.world.training else counted & batch.log_z.isfinite()).sum()

    def loss(self, scores: CompletionScores, batch: FDivergenceBatch) -> LossSums:
        """−A·log π, summed over completions."""
        log_policy = scored(scores, batch.policy_mask)[0].sum(-1)  # (B,)
        columns = torch.stack([self._log_target(batch), log_policy.detach(), batch.log_proposal, batch.baseline])
        # their values are checked, so the host waits for the device once, and not at each check
        log_target, current, log_proposal, baseline = columns.cpu().unbind(0)
        options = (self.divergence, self.alpha, self.max_pseudo_reward)
        found = dpg_advantages(log_target, current, log_proposal, baseline, *options)
        advantages, clipped = (x.to(columns.device, non_blocking=True) for x in found)
        sums = {"clipped": clipped.sum(), "kept": advantages.abs().sum()}
        return LossSums(-(advantages * log_policy).sum(), self.sums_to_report(scores, batch) | sums)

    def evaluation_loss(self, batch: FDivergenceBatch) -> LossSums:
        """The divergence, estimated on completions of the policy."""
        log_ratio = self._log_target(batch) - batch.log_policy
        return LossSums(f_divergence_terms(log_ratio, self.divergence, self.alpha).nansum(), {})

    def report(self, totals: dict[str, float]) -> None:
        """Log what [`GDCObjective`] logs, and the share of the pseudo-reward that its bound cut off."""
        super().report(totals)
        if self.max_pseudo_reward is not None:
            self.world.log("gdc/clipped", totals["clipped"] / max(totals["clipped"] + totals["kept"], 1e-30))

    def _log_target(self, batch: FDivergenceBatch) -> Tensor:
        return self.target.log_target(batch.log_prior, batch.log_likelihood, batch.log_z)
