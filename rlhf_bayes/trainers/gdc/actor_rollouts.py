"""Rollouts whose completions actors draw and score meanwhile, in processes of their own."""

import logging
import math
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from rlhf_bayes.likelihoods import Likelihood
from rlhf_bayes.numerics import importance_ess
from rlhf_bayes.objectives import Rollout
from rlhf_bayes.store import CompletionStore
from rlhf_bayes.store.completion_store import as_dataset
from rlhf_bayes.store.store_reader import StoreReader
from rlhf_bayes.store.stored_draws import StoredDraws
from rlhf_bayes.store.weights_folder import Wanted, WeightsFolder
from rlhf_bayes.trainers.gdc.gdc_config import GDCConfig
from rlhf_bayes.trainers.gdc.stored_rollouts import evidence_of, scored_rows
from rlhf_bayes.trainers.rollout.in_flight import RolloutInFlight
from rlhf_bayes.trainers.rollout.scored_rollout import prompt_key

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer

logger = logging.getLogger(__name__)

_POLL = 0.02  # seconds
_SAID_AFTER = 10.0  # seconds of waiting, after which the learner says so

Row = dict[str, Any]


@final
class ActorRollouts:
    """
    Completions of a store to which actors add, in groups of `num_generations` of a prompt, in the order of the files.

    Completions that are too old when they would be learnt from are dropped. Which ones a step learns from follows from
    the files and their order alone, so that a resumed run has the same. Of several processes the first reads, and says
    to the others what a step learns from; each takes its share of the rows.

    Args:
        store ([`CompletionStore`]):
            The completions.
        args ([`GDCConfig`]):
            The folder of the weights, the bound on their age, and what [`StoredRollouts`] reads of it.
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`], *optional*):
            Evidence in nats instead of the stored rewards.

    Attributes:
        dataset (`Dataset`): a row for each group of the whole training, which takes the place of a dataset of prompts.
    """

    def __init__(self, store: CompletionStore, args: GDCConfig, likelihood: Likelihood | None = None):
        self.store, self.args, self.likelihood = store, args, likelihood
        self.folder = WeightsFolder(str(args.actor_weights))
        self.reader = StoreReader(store, self.folder.journal)
        self.run = ""
        self._groups: list[list[Row]] = []  # whole ones, in the order in which they were completed
        self._open: dict[tuple, list[Row]] = {}  # prompt -> completions that are fewer than a group
        self._waited, self._since = 0.0, time.monotonic()
        self._dropped, self._heard, self._said = 0, self._since, False
        self.num_groups = args.generation_batch_size // args.num_generations  # of a rollout
        rollouts = math.ceil(args.max_steps / self._steps_of_rollout)
        # the prompts' token ids are in the store; RLOO asks for the column
        self.dataset = Dataset.from_dict({"prompt": ["stored"] * (self.num_groups * rollouts)})

    @property
    def _steps_of_rollout(self) -> float:
        args = self.args
        return args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps

    def normalizers(self, beta: float) -> None:
        """None: Z is pooled over the rollouts so far, since the draws are not known before."""
        return

    def begin(self) -> None:
        """Tell actors what is wanted, as training starts or goes on."""
        # a file that is drawn now is learnt from when all that are unread have been
        ahead = (self.args.max_staleness - self.args.push_steps) / self._steps_of_rollout
        self.run = uuid.uuid4().hex[:8]
        if self.reader.num_ahead:
            logger.warning(
                f"{self.reader.num_ahead} files that an earlier start has read after this position are read again, in "
                f"the same order ({self.reader.journal}). For another training, name a new folder and a new store."
            )
        wanted = Wanted(self.run, self.num_groups, self.args.num_generations, max(1, math.floor(ahead)))
        self.folder.begin(wanted)
        self._waited, self._since = 0.0, time.monotonic()

    def rollout(
        self, trainer: "RolloutTrainer", inputs: Sequence[dict[str, Any]], in_flight: RolloutInFlight
    ) -> Rollout:
        """
        The next completions that are not too old, scored under the policy alone.

        Args:
            trainer (`RolloutTrainer`):
                Holds the policy, and logs how old they are and how long it waited.
            inputs (`Sequence[dict]`):
                Rows of `dataset`, which are not read.
            in_flight ([`RolloutInFlight`]):
                The rollout.

        Raises:
            TimeoutError: if no actor adds any for `actor_timeout` seconds.
            TerminatedError: if SIGTERM comes while it waits, and `save_on_sigterm` is set.
        """
        try:
            groups, dropped = self._take(trainer)
        except TimeoutError as error:
            # a checkpoint is saved as where a reward fails: nothing has been learnt from since the last step
            trainer._failures.errors[:] = [error]
            trainer._failures.stop_all(trainer.accelerator.num_processes)
            raise
        everyone = [row for group in groups for row in group]
        staleness = [trainer.state.global_step - _drawn_at(row) for row in everyone]
        count = len(everyone) // trainer.accelerator.num_processes
        first = count * trainer.accelerator.process_index
        rows = everyone[first : first + count]
        draws = StoredDraws.of_rows(as_dataset(rows))
        rewards, features = evidence_of(draws, self.store.reward_names, self.args, self.likelihood)
        keys = [prompt_key({"prompt": p, **c}) for p, c in zip(draws.prompts, draws.columns, strict=True)]
        prompt_keys = torch.tensor(keys)[draws.prompt_index]
        rollout = scored_rows(trainer, draws, torch.arange(count), prompt_keys, rewards, features, in_flight)
        self._report(trainer, rollout, staleness, dropped)
        return rollout

    def state_dict(self) -> dict[str, Any]:
        """The position in the store, and what was read and not yet learnt from, for a checkpoint."""
        unused = [row for group in [*self._groups, *self._open.values()] for row in group]
        return {"taken": list(self.reader.taken), "unused": unused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.args.process_index > 0:  # which reads nothing
            return
        self.reader.go_on_after(state["taken"])
        self._groups, self._open = [], {}
        self._add(state["unused"])

    def _take(self, trainer: "RolloutTrainer") -> tuple[list[list[Row]], int]:
        """The groups of the next rollout of all processes, and how many completions were dropped."""
        self._dropped, self._heard, self._said = 0, time.monotonic(), False
        while True:
            if trainer.watch is not None:
                trainer.watch.check_waiting()
            found = self._found(trainer.state.global_step) if trainer.accelerator.is_main_process else None
            # the others ask with it, since a wait for it would end at the limit that collective operations have
            (found,) = broadcast_object_list([found])
            if isinstance(found, str):
                raise TimeoutError(found)
            if found is not None:
                return found, self._dropped

    def _found(self, step: int) -> list[list[Row]] | str | None:
        """The groups of the next rollout; None where there are too few yet; what to say where none came for long."""
        while True:
            fresh = [group for group in self._groups if step - _oldest(group) <= self.args.max_staleness]
            self._dropped += self.args.num_generations * (len(self._groups) - len(fresh))
            self._groups = fresh
            if len(fresh) >= self.num_groups:
                self._groups = fresh[self.num_groups :]
                return fresh[: self.num_groups]
            rows = self.reader.next()
            if rows is None:
                break
            self._add(rows)
            self._heard = time.monotonic()
        now = time.monotonic()
        if now > self._heard + self.args.actor_timeout:
            return self._no_actor()
        if now > self._heard + _SAID_AFTER and not self._said:
            self._said = True
            logger.warning(f"Waiting for completions of actors. {self._command()}")
        time.sleep(_POLL)
        self._waited += time.monotonic() - now
        return None

    def _add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            key = (row["prompt"], row["is_chat"], row["columns"])
            group = self._open.setdefault(key, [])
            group.append(row)
            if len(group) == self.args.num_generations:
                self._groups.append(self._open.pop(key))

    def _report(self, trainer: "RolloutTrainer", rollout: Rollout, staleness: list[int], dropped: int) -> None:
        weights = trainer.accelerator.gather(rollout.policy_weights)
        now = time.monotonic()
        metrics = {
            "actors/staleness": sum(staleness) / len(staleness),
            "actors/ess": importance_ess(weights.log()).item() / len(weights),
            "actors/waiting": self._waited / max(now - self._since, 1e-9),
            "actors/dropped": dropped,
        }
        self._waited, self._since = 0.0, now
        for name, value in metrics.items():
            trainer.log_metric(name, value)

    def _no_actor(self) -> str:
        return (
            f"No completion was added to the store {str(self.store.path)!r} for `actor_timeout` = "
            f"{self.args.actor_timeout:g} seconds: is an actor running? {self._command()} Then go on from the last "
            "checkpoint: what was drawn is in the store, and nothing of it is lost."
        )

    def _command(self) -> str:
        return f"Start one by `rlhf-bayes actor --store {self.store.path} --weights {self.folder.path}`."


@final
class WeightsPusher(TrainerCallback):
    """
    Pushes the policy's weights to the actors as training begins and every `push_steps` steps; tells them of its end.

    Of several processes the first does. A training that SIGTERM ends before its last step goes on later, so actors
    wait for it.

    Args:
        trainer (`RolloutTrainer`):
            The learner.
        rollouts ([`ActorRollouts`]):
            Its rollouts.
    """

    def __init__(self, trainer: "RolloutTrainer", rollouts: ActorRollouts):
        self.trainer, self.rollouts = trainer, rollouts

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.rollouts.begin()
            self._push(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step % args.push_steps == 0:
            self._push(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not self.trainer.preempted:
            self.rollouts.folder.stop()

    def _push(self, step: int) -> None:
        policy = self.trainer._plain_policy
        weights: dict[str, Tensor] = {
            name: weight.data for name, weight in policy.named_parameters() if weight.requires_grad
        }
        adapters: Any = getattr(policy, "peft_config", None)
        adapter = None if adapters is None else adapters[policy.active_adapter]
        self.rollouts.folder.push(step, self.rollouts.run, weights, adapter)


def _drawn_at(row: Row) -> int:
    """The optimizer step of the policy that drew a completion; 0 for the prior."""
    return row["step"] or 0


def _oldest(group: Sequence[Row]) -> int:
    return min(map(_drawn_at, group))
