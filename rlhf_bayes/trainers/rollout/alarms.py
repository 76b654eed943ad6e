"""Alarms of a training: signs of harm, collapse, noise or standstill that only a known posterior can give."""

import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from rlhf_bayes.numerics.groups import grouped
from rlhf_bayes.objectives import Rollout
from rlhf_bayes.trainers.rollout.prior_draws import ByPrompt, PriorDraws
from rlhf_bayes.trainers.rollout.trainer_world import TrainerWorld

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer

logger = logging.getLogger(__name__)

_WINDOW = 5  # rollouts
_STEPS = 20  # optimizer steps over which the weights of GDC are judged
_CHANCE = 1e-6  # probability of a false alarm at one rollout; a run has thousands of them
_COLLAPSED = 0.9  # share of the posterior's entropy below which a policy has collapsed
_FEW = 3.0  # completions: with fewer behind it, a step is noise
_MOVED = 0.01  # share of the posterior's distance, or nats of it, below which nothing has moved


@final
class Alarms(TrainerCallback):
    """
    Looks at each rollout of a training, warns once of each kind of trouble, and ends the run if that is asked for.

    Each statistic is compared with its error, see [`ByPrompt.is_below`], so that noise raises no alarm.

    Args:
        trainer (`RolloutTrainer`):
            The trainer, which passes its rollouts to `see` and its metrics to `note`.

    Attributes:
        prior (`PriorDraws`): draws of the prior, from before the training and from its first rollouts.
        raised (`dict[str, str]`): kind of trouble -> what was said of it.
        alone (`bool`): whether completions are drawn for the alarms alone, and the training does not learn from them.
    """

    def __init__(self, trainer: "RolloutTrainer"):
        self.trainer = trainer
        self.prior = PriorDraws()
        self.raised: dict[str, str] = {}
        self.alone = False
        self._world = TrainerWorld(trainer)
        self._rollouts: deque[dict[str, Tensor]] = deque(maxlen=_WINDOW)
        self._noted: dict[str, deque[float]] = {
            name: deque(maxlen=_STEPS) for name in ("gdc/step_ess", "posterior/khat")
        }

    @property
    def collapse(self) -> str | None:
        """What was said of harm or collapse, if anything was."""
        return self.raised.get("harm", self.raised.get("collapse"))

    def see(self, rollout: Rollout) -> None:
        """Look at the completions of a rollout, in all processes."""
        log_policy, log_prior = rollout.token_log_probs.sum(-1), rollout.ref_token_log_probs.sum(-1)
        kls = log_policy - log_prior if rollout.token_kl is None else rollout.token_kl.sum(-1)
        local = torch.stack([rollout.rewards, log_policy, log_prior, kls], dim=-1).double()
        keys = self._world.gather(rollout.prompt_keys).cpu()
        rewards, log_policy, log_prior, kls = self._world.gather(local).cpu().unbind(-1)  # (B_global,)
        scored = ~rewards.isnan()
        if not scored.any():
            return
        keys, rewards, log_policy, log_prior, kls = (
            column[scored] for column in (keys, rewards, log_policy, log_prior, kls)
        )
        log_ratios = log_policy - log_prior
        by_policy = rollout.drawn_from in ("policy", "engine")
        untrained = self.trainer.state.global_step == 0 and by_policy and _equal(log_ratios)
        if rollout.drawn_from == "prior" or untrained:
            self.prior.add(keys, rewards, log_prior)
        if self.alone or not by_policy or self.trainer.beta <= 0:
            return
        self._rollouts.append(
            {"keys": keys, "rewards": rewards, "penalties": log_ratios, "surprise": -log_policy, "kls": kls}
        )
        if not untrained:
            self._check_harm()
            self._check_entropy()

    def note(self, name: str, value: float) -> None:
        """Look at a metric of a training."""
        if name == "step_kl":
            self._check_step(value)
        if name not in self._noted or not math.isfinite(value):
            return
        self._noted[name].append(value)
        values = torch.tensor(self._noted[name], dtype=torch.float64)
        if len(values) < _STEPS:
            return
        mean, error = values.mean().item(), 3 * values.std().item() / math.sqrt(_STEPS)
        args = self.trainer.args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if name == "gdc/step_ess" and mean + error < min(_FEW, rows / 4):
            self._raise(
                "noise",
                f"The steps of this training are noise: of the {rows} completions of a step, {mean:.1f} count (the "
                f"effective sample size of their weights, a mean of {_STEPS} steps). Draw more completions a step, "
                "start at a posterior nearer to the prior (`beta_init`), or set `ess_min` to skip such steps.",
            )
        if name == "posterior/khat" and mean - error > 0.7:
            self._raise(
                "tail",
                f"The weights of this training have too heavy a tail: k̂ is {mean:.2f} ± {error / 3:.2f} over {_STEPS} "
                "rollouts, above 0.7. Its steps and estimates of Z rest on few completions: draw more a prompt, or "
                "start at a posterior nearer to the prior (`beta_init`).",
            )

    def on_step_end(self, args, state, control, **kwargs):
        if args.stop_on_collapse and self.collapse is not None:
            control.should_training_stop = True
            control.should_save |= args.save_strategy != SaveStrategy.NO

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step >= 10:
            self._check_standstill(args.learning_rate)

    def check(self) -> None:
        """
        Raise the error that ended the training, if there is one. Call it after the training.

        Raises:
            RuntimeError: if the policy collapsed and `stop_on_collapse` is set.
        """
        if self.trainer.args.stop_on_collapse and self.collapse is not None:
            raise RuntimeError(f"`stop_on_collapse` ended the training. {self.collapse}")

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"prior": self.prior.state_dict(), "raised": self.raised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.prior.load_state_dict(state["prior"])
        self.raised = dict(state["raised"])

    def _check_harm(self) -> None:
        before, beta = self.prior.mean_rewards(), self.trainer.beta
        objective = self._in_window("rewards") - beta * self._in_window("penalties")  # (n,), in reward
        after = ByPrompt.of(self._in_window("keys"), objective)
        if before is None or not after.is_below(before, _CHANCE):
            return
        self._raise(
            "harm",
            f"This training does harm: E[r]/β − KL(π‖π0) is {after.scaled(1 / beta)} nats at step "
            f"{self.trainer.state.global_step}, and the untrained prior has {before.scaled(1 / beta)}. Lower "
            f"`learning_rate` (now {self.trainer.args.learning_rate:g}), and start from an earlier checkpoint. "
            "`stop_on_collapse=True` ends a run that does this.",
        )

    def _check_entropy(self) -> None:
        of_posterior = self.prior.posterior_entropies(self.trainer.beta)
        if of_posterior is None:
            return
        entropies = ByPrompt.of(self._in_window("keys"), self._in_window("surprise"))
        if not entropies.is_below(of_posterior.scaled(_COLLAPSED), _CHANCE):
            return
        self._raise(
            "collapse",
            f"The policy collapses: its entropy is {entropies} nats per sequence at step "
            f"{self.trainer.state.global_step}, and that of the posterior is {of_posterior}. Training "
            "on does not lead there: lower `learning_rate`, or go back to an earlier checkpoint. "
            "`stop_on_collapse=True` ends a run that does this.",
        )

    def _check_step(self, kl: float) -> None:
        if self.trainer.beta <= 0 or len(self.prior) == 0:
            return
        args, state, distance = self.trainer.args, self.trainer.state, self.prior.distance(self.trainer.beta)
        if kl > distance:
            self._raise(
                "stride",
                f"Step {state.global_step} has moved the policy by a KL of {kl:.2g} nats, further than the prior is "
                f"from the posterior ({distance:.2g} nats). A step learns from noise too: lower `learning_rate` (now "
                f"{args.learning_rate:g}), or leave it out, to have it adapted.",
            )
        # KL grows at most with the square of the number of steps, if all of them lead the same way
        farthest = kl * state.max_steps**2
        if not (args.adapt_learning_rate or self.raised) and farthest < _MOVED * distance:
            self._raise(
                "standstill",
                f"This training will not move: an optimizer step changes the policy by a KL of {kl:.1e} nats, so that "
                f"{state.max_steps} steps come to {farthest:.1e} nats at most, and the posterior is {distance:.2g} "
                f"nats away. Raise `learning_rate` (now {args.learning_rate:g}), or leave it out, to have it adapted.",
            )

    def _check_standstill(self, learning_rate: float) -> None:
        if not self._rollouts or self.raised:
            return
        kls = self._in_window("kls")
        spreads = [
            grouped(rollout["keys"]).table(rollout["rewards"] / self.trainer.beta, torch.nan).var(-1)
            for rollout in self._rollouts
        ]
        spread = torch.cat(spreads).nanmean().item()  # over prompts
        # for a small β·spread it is 2·KL(π0‖π*); log-ratios of a policy at this KL have a variance of about 2·KL
        kl, distance, noise = kls.mean().item(), spread / 2, 2 / len(kls)
        if math.isfinite(distance) and distance > _MOVED and kl < min(noise, _MOVED * distance):
            self._raise(
                "standstill",
                f"Nothing has moved: after {self.trainer.state.global_step} steps KL(π‖π0) is {kl:.1e} nats, less "
                f"than {len(kls):,} completions can tell from 0, while the evidence varies by {math.sqrt(spread):.2g} "
                f"nats within a prompt. Raise `learning_rate` (now {learning_rate:g}): 1e-5 to 1e-4 is usual for all "
                "weights of a small model, 1e-4 to 1e-3 for LoRA.",
            )

    def _in_window(self, name: str) -> Tensor:
        """A column of all rollouts in the window: (n,)."""
        return torch.cat([rollout[name] for rollout in self._rollouts])

    def _raise(self, kind: str, text: str) -> None:
        if kind not in self.raised:
            self.raised[kind] = text
            if self._world.process_index == 0:
                logger.warning(text)


def _equal(log_ratios: Tensor) -> bool:
    """Whether policy and prior are the same model, up to the noise of half precision."""
    return log_ratios.mean().abs().item() < 0.05 and log_ratios.abs().max().item() < 0.5
