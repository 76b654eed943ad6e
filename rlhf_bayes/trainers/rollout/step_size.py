"""The learning rate as a consequence of how far an optimizer step may move the policy."""

import logging
import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from transformers import TrainerCallback

from rlhf_bayes.numerics import k3
from rlhf_bayes.trainers._trl.engines import in_full_precision, reshard
from rlhf_bayes.trainers.rollout.in_flight import OptimizerStep
from rlhf_bayes.trainers.rollout.trainer_world import TrainerWorld

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer

logger = logging.getLogger(__name__)

STEP_SHARE = 0.01  # KL of a step that learns from `STEP_COMPLETIONS`, as a share of KL(π‖π*)
STEP_COMPLETIONS = 64
SETTLED = 5  # the step that is measured where the rate is fixed: Adam's first steps are longer than later ones
_FIRST_STEPS, _LATER = 20, 10  # where it is adapted: each of the first steps, then every tenth
_LEAST_DECAY = 0.2  # steps at less than this share of the learning rate say little of it
_ROWS = 64  # of a process, by which a step is measured
_LARGEST_FACTOR = 3.0  # by which one step may change the learning rate
_MEMORY = 5  # measurements, over which the curvature is averaged
_ROLLOUTS = 10  # over which KL(π‖π*) is averaged
_LEAST_REMAINING = 0.05  # of KL(π0‖π*): the gap of a few completions may be 0 or less
_MOST_REMAINING = 2.0  # of KL(π0‖π*): a policy that is being ruined must not be given longer steps for it


@final
class StepSize(TrainerCallback):
    r"""
    Measures how far optimizer steps move the policy, and, where the learning rate is adapted, chooses it by that.

    A step of the learning rate η moves the policy by KL(π‖π') ≈ C·η². C is measured on the completions that the step
    learns from, and η follows from the KL that is wanted at the start:

        KL(π‖π') = 0.01 · KL(π‖π*) · n/64

    KL(π‖π*) is what remains: `posterior/gap`, averaged over the last ten rollouts, from KL(π0‖π*) on, and counted as
    0.05 to 2 times KL(π0‖π*). Where the gap is not known, it stays KL(π0‖π*). Near the posterior the noise of the
    gradient is all that moves the policy, so steps that stayed as long as the first ones would keep it away.

    n is the number of completions that are drawn for each optimizer step. The noise of a gradient falls like 1/n, so
    that the step may be so much longer, and each completion moves the policy as far, however a batch is divided into
    steps. The scheduler's decay multiplies η. `benchmarks/real_posterior.py` measures how close this comes to the best
    learning rate.

    Args:
        trainer (`RolloutTrainer`):
            The trainer, which calls `begin` before the first forward of each optimizer step, and passes its metrics
            to `note`.

    Attributes:
        adapts (`bool`): whether the learning rate is adapted in this training.
    """

    def __init__(self, trainer: "RolloutTrainer"):
        self.trainer = trainer
        self.adapts = False
        self._world = TrainerWorld(trainer)
        self._measured = 0
        self._log_curvature = 0.0
        self._remaining: float | None = None  # KL(π‖π*), nats
        self._before: tuple[OptimizerStep, float, Tensor] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        obstacle = self._obstacle()
        self.adapts = bool(args.adapt_learning_rate) and obstacle is None
        if args.adapt_learning_rate and obstacle is not None and args.process_index == 0:
            logger.warning(
                f"`learning_rate` is not given, and cannot be adapted: {obstacle}. It is {args.learning_rate:g}, as "
                "in TRL, at which a short run learns little. 1e-5 to 1e-4 is usual for all weights of a small model, "
                "1e-4 to 1e-3 for LoRA."
            )

    def note(self, name: str, value: float) -> None:
        """Look at a metric of a training."""
        if name == "posterior/gap" and self.adapts and math.isfinite(value):
            distance = self._distance()
            remaining = distance if self._remaining is None else self._remaining
            self._remaining = remaining + (min(value, _MOST_REMAINING * distance) - remaining) / _ROLLOUTS

    def begin(self, step: OptimizerStep) -> None:
        """Keep the log-probs before this optimizer step, if it is to be measured. In all processes."""
        number = self.trainer.state.global_step
        rate, decay = self._rate_and_decay()
        due = number < _FIRST_STEPS or number % _LATER == 0 if self.adapts else number == SETTLED - 1
        self._before = None
        if due and self._can_measure and not step.skipped and rate > 0 and decay >= _LEAST_DECAY:
            self._before = step, rate, self._log_probs(step)

    def on_step_end(self, args, state, control, **kwargs):
        if self._before is None:
            return
        (step, rate, before), self._before = self._before, None
        kl = self._kl(before, self._log_probs(step))
        reshard(self.trainer.model)
        if not 0 < kl < math.inf:
            return  # the step was skipped, or has broken the policy
        self._world.log("step_kl", kl)
        if self.adapts:
            self._adapt(kl, rate)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"measured": self._measured, "log_curvature": self._log_curvature, "remaining": self._remaining}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._measured, self._log_curvature = state["measured"], state["log_curvature"]
        self._remaining = state.get("remaining")  # checkpoints of earlier versions have none

    def _adapt(self, kl: float, rate: float) -> None:
        self._measured += 1
        found = math.log(kl) - 2 * math.log(rate)
        # Adam's first steps are longer than later ones of the same rate, so that old measurements must fade
        self._log_curvature += (found - self._log_curvature) / min(self._measured, _MEMORY)
        wanted = math.exp(0.5 * (math.log(self._wanted_kl(self._to_go())) - self._log_curvature))
        scheduler = self._scheduler
        factor = min(max(wanted / scheduler.base_lrs[0], 1 / _LARGEST_FACTOR), _LARGEST_FACTOR)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] *= factor
        scheduler.base_lrs = [factor * rate for rate in scheduler.base_lrs]

    def _distance(self) -> float:
        """KL(π0‖π*) of the β of this moment, nats."""
        return self.trainer.alarms.prior.distance(self.trainer.beta)

    def _to_go(self) -> float:
        """KL(π‖π*), nats, which is positive."""
        distance = self._distance()
        return distance if self._remaining is None else max(self._remaining, _LEAST_REMAINING * distance)

    def _wanted_kl(self, distance: float) -> float:
        """KL(π‖π') of a step before any decay, nats per sequence."""
        args = self.trainer.args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return min(STEP_SHARE * rows / args.num_iterations / STEP_COMPLETIONS, 0.1) * distance

    @torch.no_grad()
    def _log_probs(self, step: OptimizerStep) -> Tensor:
        """
        log π of the tokens of some completions of a step: (n, T), in the precision of the weights.

        It is 0 at padding and for the tokens of an environment.
        """
        trainer, rows = self.trainer, []
        for batch in step.batches:
            room = _ROWS - sum(map(len, rows))
            if room > 0:
                part = batch.take(slice(room))
                model = trainer.model if trainer.sharded else trainer._plain_policy
                with in_full_precision(model):  # the noise of half precision may be larger than a step
                    scores = trainer.score(model, part)
                rows.append(torch.where(part.policy_tokens, scores.log_probs.float(), 0.0))
        width = max(part.size(1) for part in rows)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.size(1))) for part in rows])

    def _kl(self, before: Tensor, after: Tensor) -> float:
        """KL(π‖π'), nats per sequence, a mean over the rows of all processes."""
        per_row = k3(before, after).sum(-1)  # (n,)
        total, count = self._world.reduce(torch.stack([per_row.sum(), per_row.new_tensor(float(len(per_row)))]))
        return (total / count).item()

    @property
    def _scheduler(self) -> Any:
        scheduler = self.trainer.lr_scheduler
        return getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it under DeepSpeed

    def _rate_and_decay(self) -> tuple[float, float]:
        """The learning rate of the next step, and its share of the rate before any warmup and decay."""
        rate = self.trainer.optimizer.param_groups[0]["lr"]
        base = getattr(self._scheduler, "base_lrs", [rate])[0]
        return rate, rate / base if base > 0 else 0.0

    @property
    def _can_measure(self) -> bool:
        halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.trainer.model.parameters())
        return not halves and not (self.trainer.sharded and self.trainer.accelerator.mixed_precision != "no")

    def _obstacle(self) -> str | None:
        """Why the learning rate cannot be adapted; None if it can."""
        trainer = self.trainer
        if not self._can_measure:
            return "the policy is computed in half precision, whose noise is larger than a step"
        if trainer.own_optimizer:
            return "`optimizers` has its own"
        if not hasattr(self._scheduler, "base_lrs"):
            return f"a {type(self._scheduler).__name__} has no learning rate that it starts from"
        return None
