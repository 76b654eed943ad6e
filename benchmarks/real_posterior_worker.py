"""One run of `real_posterior.py`: trains once, measures the policy with fresh draws, and keeps the result."""

import functools
import hashlib
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cached_llama import CachedLlama
from equal_samples import BATCH, TRAINERS, make_trainer
from posterior_distances import Draws, distances, prior_draws, prompt_token_ids
from real_tasks import TASKS, Folders, Task
from transformers import TrainerCallback

from rlhf_bayes.lm.merging import merged

LAST_ROLLOUTS = 10  # over which the trainer's own metrics are averaged
LOGGED = ("posterior/gap", "posterior/log_z", "ppo/explained_variance")


@dataclass(frozen=True)
class Method:
    """A row of the table: a trainer of `equal_samples.TRAINERS`, and what of its config departs from the others."""

    trainer: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    learning_rates: tuple[float, ...] = (2e-5, 5e-5, 1e-4)
    """Tried first, ascending. A single one is not tuned."""
    lora: bool = False
    """Whether an adapter is trained rather than all weights."""

    def __post_init__(self) -> None:
        if self.trainer not in TRAINERS:
            raise ValueError(f"`trainer` must be one of {', '.join(TRAINERS)}, got {self.trainer!r}.")


@dataclass(frozen=True)
class Sizes:
    """Numbers of draws, a prompt each, and of completions to train on."""

    samples: int = 6400
    prior: int = 2048
    verdict: int = 128
    forward: int = 256
    choice: int = 64
    """Draws that choose the learning rate: other ones than those of the verdict, of a run that has no verdict."""


@dataclass(frozen=True)
class Run:
    """A training run of a method at a learning rate, for the choice of the rate or for the verdict."""

    task: str
    name: str
    method: Method
    learning_rate: float
    seed: int
    sizes: Sizes
    for_verdict: bool

    def path(self, folder: Path, fingerprint: str) -> Path:
        """Its file: a legible name with a hash of all settings and of the task's `fingerprint`."""
        method = {"trainer": self.method.trainer, "options": self.method.options}
        if self.method.lora:  # results with all weights keep the names that they had before there was a choice
            method["lora"] = True
        settings = asdict(self) | {"method": method, "fingerprint": fingerprint}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        legible = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.name} {self.learning_rate:g} {self.seed}").strip("-").lower()
        return folder / "runs" / f"{self.task}_{legible}_{digest}.json"


@dataclass(frozen=True)
class Target:
    """A task with the prior loaded and its draws at hand."""

    task: Task
    prior: CachedLlama
    draws: Draws
    fingerprint: str
    """Of the task."""

    @classmethod
    def of(
        cls, name: str, folders: Folders, prior_size: int, on_prompt: Callable[[], None] = lambda: None
    ) -> "Target":
        """Draws from the prior if no file holds its draws; `on_prompt` is then called after each prompt."""
        task = TASKS[name](folders)
        prior = cached(task, task.model)
        prior.check(prompt_token_ids(task)[0])
        fingerprint = task.fingerprint(prior.model)
        path = folders.output / f"prior_{task.name}_{prior_size}_{fingerprint}.pt"
        return cls(task, prior, prior_draws(task, prior, prior_size, path, on_prompt), fingerprint)


def cached(task: Task, folder: Path) -> CachedLlama:
    """A fast copy of the prior or of a policy."""
    return CachedLlama(task.load_model(folder), task.load_tokenizer().eos_token_id, task.length)


@functools.cache
def target_of(name: str, folders: Folders, prior_size: int) -> Target:
    """The target of a task, once a process."""
    return Target.of(name, folders, prior_size)


class RolloutLog(TrainerCallback):
    """Keeps the trainer's own metrics of every rollout, and tells the progress."""

    def __init__(self, on_step: Callable[[float], None]):
        self.on_step, self.rows = on_step, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append({name: logs[name] for name in LOGGED if name in logs})

    def on_step_end(self, args, state, control, **kwargs):
        self.on_step(state.global_step / state.max_steps)

    def at_the_end(self) -> dict[str, float]:
        """Means over the last rollouts."""
        rows = [row for row in self.rows if row][-LAST_ROLLOUTS:]
        return {name: statistics.mean(row[name] for row in rows) for name in LOGGED if rows and name in rows[-1]}


def train(
    run: Run, task: Task, folder: Path, on_step: Callable[[float], None] = lambda share: None
) -> dict[str, float]:
    """Train, save the policy to the folder, and return what the trainer said of it at the end."""
    log, options = RolloutLog(on_step), {"num_generations": task.num_generations} | run.method.options
    trainer = make_trainer(
        run.method.trainer,
        options,
        model=task.model,
        tokenizer=task.load_tokenizer(),
        reward_func=task.reward,
        # a batch takes BATCH / num_generations rows, so the dataset needs at least as many
        prompts=task.prompts * math.ceil(BATCH / options["num_generations"] / len(task.prompts)),
        beta=task.beta,
        max_completion_length=task.length,
        learning_rate=run.learning_rate,
        seed=run.seed,
        samples=run.sizes.samples,
        output_dir=folder,
        lora=run.method.lora,
        callbacks=[log],
        log_every_rollout=True,
    )
    trainer.train()
    if run.method.lora:
        merged(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(folder)
    else:
        trainer.save_model(str(folder))
    return log.at_the_end()


def measure(
    run: Run, folders: Folders, fresh: bool = False, on_step: Callable[[float], None] = lambda share: None
) -> dict[str, Any]:
    """The result of a run: from its file, or by training. A `fresh` one replaces its file."""
    target = target_of(run.task, folders, run.sizes.prior)
    path = run.path(folders.output, target.fingerprint)
    if path.exists() and not fresh:
        return json.loads(path.read_text())
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        logged = train(run, target.task, Path(folder), on_step)
        trained = time.perf_counter()
        policy = cached(target.task, Path(folder))
    policy.check(prompt_token_ids(target.task)[0])
    found = distances(
        policy,
        target.prior,
        target.task,
        target.draws,
        n=run.sizes.verdict if run.for_verdict else run.sizes.choice,
        forward_draws=run.sizes.forward if run.for_verdict else 0,
        seed=10_000 + run.seed,
    )
    seconds = {"training": trained - started, "measuring": time.perf_counter() - trained}
    result = asdict(run) | {"distances": found.as_dict(), "logged": logged, "seconds": seconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result) + "\n")
    part.replace(path)
    return result


def check_samples(samples: int) -> None:
    if samples <= 0 or samples % BATCH:
        raise ValueError(f"`--samples` must be a positive multiple of {BATCH}, got {samples}.")
