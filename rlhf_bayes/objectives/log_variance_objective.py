"""The log-variance loss, which is 0 where log π − log p is the same for every completion of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from rlhf_bayes.lm import CompletionScores
from rlhf_bayes.numerics.log_variance import LogVarianceCentres, log_variance_centres, log_variance_loss
from rlhf_bayes.objectives.gdc_batch import GatheredRollout, GDCBatch
from rlhf_bayes.objectives.gdc_objective import GDCObjective
from rlhf_bayes.objectives.objective import LossSums, Step, scored
from rlhf_bayes.objectives.posterior_target import PosteriorTarget, TargetEstimate
from rlhf_bayes.objectives.proposal import Comparison
from rlhf_bayes.objectives.replay import ReplayBuffer
from rlhf_bayes.objectives.rollout import Rollout
from rlhf_bayes.objectives.world import World, own_rows


@dataclass(frozen=True)
class LogVarianceBatch(GDCBatch):
    """The batch of the log-variance loss. Without a centre, it holds all completions of its prompts."""

    centre: Tensor | None = None
    """(B,): the mean of log π − log p over the prompt's completions, nats."""
    scale: Tensor | None = None
    """(B,): the factor that makes the variance unbiased."""


@final
class LogVarianceObjective(GDCObjective[LogVarianceBatch]):
    r"""
    Half the variance of log π − log π0 − log_likelihood over a prompt's completions, from any proposal.

        loss = Σ_i scale_i·(log π(x_i) − log π0(x_i) − log_likelihood(x_i) − centre_i)²/2

    Args:
        world, target, replay, ess_min, comparison:
            As in [`GDCObjective`].
        huber_delta (`float`, *optional*):
            Nats beyond which a deviation counts linearly.
        forbidden_gap (`float`, *optional*, defaults to `1.0`):
            The loss of a forbidden completion is 0 once log π is this many nats below log π0.

    Source: Richter et al. 2020, arXiv 2010.10436; with replay: Bartoldson et al. 2025, 2503.18929.
    """

    batch_type = LogVarianceBatch

    def __init__(
        self,
        world: World,
        target: PosteriorTarget,
        replay: ReplayBuffer[LogVarianceBatch],
        *,
        huber_delta: float | None = None,
        forbidden_gap: float = 1.0,
        ess_min: float = 1.0,
        comparison: Comparison | None = None,
    ):
        super().__init__(world, target, replay, ess_min=ess_min, comparison=comparison)
        self.huber_delta, self.forbidden_gap = huber_delta, forbidden_gap

    def columns(self, rollout: Rollout, everyone: GatheredRollout, estimate: TargetEstimate) -> dict[str, Tensor]:
        """Centres for evaluation. In training they are computed before each step, with the policy of that moment."""
        if self.world.training:
            return {}
        # in fp32 like the columns of a batch
        log_probs = everyone.log_policy.float(), everyone.log_prior.float()
        evidence = everyone.log_likelihood.float(), estimate.log_z.float()
        centres = self._centres(*log_probs, *evidence, everyone.prompt_keys)
        return {"centre": centres.centre, "scale": centres.scale}

    def step(
        self, batches: Sequence[LogVarianceBatch], new_rollout: Sequence[LogVarianceBatch] | None
    ) -> Step[LogVarianceBatch]:
        """The step of [`GDCObjective`], with the centres of its prompts."""
        step = super().step(batches, new_rollout)
        if len(step.batches) == 1 and self.world.num_processes == 1:
            return step  # the loss computes the centres from its own forward
        # the policy that scored a new rollout has not moved since
        scored_now = new_rollout is not None and not self.replays
        return replace(step, batches=self._with_centres(step.batches, scored_now))

    def loss(self, scores: CompletionScores, batch: LogVarianceBatch) -> LossSums:
        """The loss, summed over completions."""
        log_policy = scored(scores, batch.policy_mask)[0].sum(-1)  # (B,)
        return LossSums(self._loss(log_policy, batch), self.sums_to_report(scores, batch))

    def evaluation_loss(self, batch: LogVarianceBatch) -> LossSums:
        """The loss of the policy that drew the batch."""
        return LossSums(self._loss(batch.log_policy, batch), {})

    def _loss(self, log_policy: Tensor, batch: LogVarianceBatch) -> Tensor:
        if batch.centre is None or batch.scale is None:
            columns = (batch.log_prior, batch.log_likelihood, batch.log_z)
            centres = self._centres(log_policy, *columns, batch.prompt_keys)
        else:
            centres = LogVarianceCentres(batch.centre, batch.scale)
        evidence = self.target.power * batch.log_likelihood
        options = (self.huber_delta, self.forbidden_gap)
        return log_variance_loss(log_policy, batch.log_prior, evidence, centres, *options).sum()

    def _with_centres(self, batches: Sequence[LogVarianceBatch], scored_now: bool) -> list[LogVarianceBatch]:
        # a prompt's completions may be spread over micro-batches and processes, so their mean needs all log-probs
        log_policy = torch.cat([batch.log_policy if scored_now else self.world.log_probs(batch) for batch in batches])
        names = ("log_prior", "log_likelihood", "log_z")
        local = torch.stack(
            [log_policy, *(torch.cat([getattr(batch, name) for batch in batches]) for name in names)], dim=-1
        )
        log_policy, log_prior, log_likelihood, log_z = self.world.gather(local.float()).unbind(-1)  # (M_global,)
        keys = self.world.gather(torch.cat([batch.prompt_keys for batch in batches]))
        centres = self._centres(log_policy, log_prior, log_likelihood, log_z, keys)
        sizes = [len(batch) for batch in batches]
        own = zip(*(own_rows(self.world, column).split(sizes) for column in centres), strict=True)
        return [
            replace(batch, centre=centre, scale=scale) for batch, (centre, scale) in zip(batches, own, strict=True)
        ]

    def _centres(
        self, log_policy: Tensor, log_prior: Tensor, log_likelihood: Tensor, log_z: Tensor, prompt_keys: Tensor
    ) -> LogVarianceCentres:
        evidence = self.target.power * log_likelihood
        # on the host, since the layout of the groups and the checks depend on values
        policy, prior, evidence, log_z = torch.stack([log_policy.detach(), log_prior, evidence, log_z]).cpu().unbind(0)
        # where the evidence forbids completions, deviations are measured from −log Z instead of a mean
        known = log_z if self.target.forbids else None
        centres = log_variance_centres(policy, prior, evidence, prompt_keys.cpu(), self.huber_delta, known)
        return LogVarianceCentres(*(x.to(log_policy.device, non_blocking=True) for x in centres))
