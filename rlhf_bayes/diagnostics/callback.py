"""A callback that estimates the distance to the posterior at each evaluation of any trainer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from transformers import Trainer, TrainerCallback

from rlhf_bayes.diagnostics.estimates import PosteriorFit
from rlhf_bayes.diagnostics.evaluate import Evaluation, evaluate
from rlhf_bayes.diagnostics.over_prompts import Estimate
from rlhf_bayes.diagnostics.quantities import shown_in
from rlhf_bayes.diagnostics.scored_draws import ScoredDraws
from rlhf_bayes.diagnostics.trackers import log_to_trackers
from rlhf_bayes.lm import LanguageModel, Prompt
from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.head import excluded_tokens
from rlhf_bayes.posterior import Posterior

PREFIX = "eval_posterior_fit/"


@final
class PosteriorCallback(TrainerCallback):
    """
    Runs [`evaluate`] at the evaluations of a TRL trainer, also RLOO's and GRPO's, and logs to `report_to`.

        posterior = LanguageModel(model_id, max_completion_length=64).tilt(reward_func, beta=0.05)
        trainer.add_callback(PosteriorCallback(posterior, trainer))

    Metrics are `eval_posterior_fit/…`, the fields of [`PosteriorFit`] (nats per sequence), most with a
    `…_standard_error`. Those that cannot be trusted, or are infinite, are left out; `eval_posterior_fit/trustworthy`
    is 1 if log Z can be trusted, else 0. `trainer.evaluate()` returns them too, for `metric_for_best_model`. Every
    evaluation uses the same seed, and the prior's completions are drawn once. Training is not influenced: the random
    state is restored. With several processes, the main one draws and scores like a single process, and the others
    wait.

    PPOTrainer's `eval_posterior/…` estimate the same quantities from the few completions of its own evaluation.

    Args:
        posterior ([`~rlhf_bayes.Posterior`]):
            The posterior to which the distance is measured. Its prior must have the trainer's `max_completion_length`,
            `temperature` and `chat_template_kwargs`. It is not checked that the trainer trains towards it.
        trainer ([`~transformers.Trainer`]):
            The trainer, whose model is the policy.
        prompts (`Sequence` of `str` or of chat messages, *optional*):
            P prompts. Default: the first `max_prompts` of the trainer's `eval_dataset`, with its other columns.
        n (`int`, *optional*, defaults to `64`):
            Completions for each prompt.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns that reward functions ask for, P entries each; only together with `prompts`.
        max_prompts (`int`, *optional*, defaults to `16`):
            Number of prompts of the `eval_dataset` that are used.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Attributes:
        last ([`Evaluation`], *optional*):
            The latest evaluation, on the main process.

    Raises:
        ValueError: if there are no prompts, the prior draws other completions than the trainer, the trainer has a
            processor of images, or the weights are sharded (FSDP, ZeRO-3): then evaluate the saved model.
        RuntimeError: on the other processes, if an evaluation fails on the main process.
    """

    def __init__(
        self,
        posterior: Posterior,
        trainer: Trainer,
        prompts: Sequence[Prompt] | None = None,
        n: int = 64,
        columns: Mapping[str, Sequence] | None = None,
        max_prompts: int = 16,
        seed: int = 0,
    ):
        _check(posterior, trainer, n)
        if prompts is None:
            prompts, columns = _first_rows(trainer, max_prompts)
        self.posterior, self.trainer, self.prompts, self.columns = posterior, trainer, prompts, columns
        self.n, self.seed = n, seed
        self.last: Evaluation | None = None
        self._from_prior: ScoredDraws | None = None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        found = self._on_one_of(args.world_size, state.is_world_process_zero)
        if metrics is not None:
            metrics.update(found)
        # the log of transformers' Trainer, since TRL's would log its completions a second time
        Trainer.log(self.trainer, dict(found))
        if self.last is not None and state.is_world_process_zero:
            log_to_trackers(self.trainer, tables={f"{PREFIX}quantities": self.last.to_pandas()})

    def _on_one_of(self, num_processes: int, is_main: bool) -> dict[str, float]:
        """The metrics that the main process computes, returned on all, so that all choose the same best model."""
        if num_processes == 1:
            return self._evaluate()
        outcome: list[dict[str, float] | str | None] = [None]
        error: Exception | None = None
        if is_main:
            try:
                outcome[0] = self._evaluate()
            except Exception as raised:  # any error, since the other processes wait for the outcome
                error, outcome[0] = raised, f"{type(raised).__name__}: {raised}"
        broadcast_object_list(outcome)
        if error is not None:
            raise error
        if not isinstance(outcome[0], dict):
            raise RuntimeError(f"PosteriorCallback failed on the main process: {outcome[0]}")
        return outcome[0]

    def _evaluate(self) -> dict[str, float]:
        prior = self.posterior.prior
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        was_training = model.training
        policy = LanguageModel(
            model,
            prior.tokenizer,
            prior.max_completion_length,
            prior.temperature,
            prior.batch_size,
            prior.chat_template_kwargs,
        )
        generator = torch.Generator().manual_seed(self.seed)
        try:
            self.last = evaluate(
                policy, self.posterior, self.prompts, self.n, generator, self.columns, from_prior=self._from_prior
            )
        finally:
            model.train(was_training)
        self._from_prior = self.last.from_prior
        return _metrics(self.last.policy) | {
            f"{PREFIX}trustworthy": float(self.last.log_z.trustworthy),
            f"{PREFIX}importance_ess": self.last.log_z.importance_ess.mean().item(),
        }


def _metrics(fit: PosteriorFit) -> dict[str, float]:
    metrics = {}
    for name, quantity in shown_in("callback").items():
        estimate: Estimate | None = getattr(fit, name)
        # JSON has no infinity; forbidden completions, which cause it, are reported by `forbidden`
        if estimate is None or not estimate.trustworthy or not math.isfinite(estimate.mean):
            continue
        metrics[f"{PREFIX}{name}"] = estimate.mean
        if quantity.error_logged:
            metrics[f"{PREFIX}{name}_standard_error"] = estimate.standard_error
    return metrics


def _check(posterior: Posterior, trainer: Trainer, n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"`n` must be an integer of at least 2, completions a prompt, got {n!r}.")
    prior, args = posterior.prior, trainer.args
    for name in ("max_completion_length", "temperature"):
        if getattr(args, name, None) not in (None, getattr(prior, name)):
            raise ValueError(
                f"`posterior` must have a prior with the trainer's `{name}` = {getattr(args, name)}, got "
                f"{getattr(prior, name)}: the policy is trained on other completions. Pass `{name}` to the prior's "
                "`LanguageModel`."
            )
    wanted = getattr(args, "chat_template_kwargs", None) or {}
    if hasattr(args, "chat_template_kwargs") and wanted != prior.chat_template_kwargs:
        raise ValueError(
            f"`posterior` must have a prior with the trainer's `chat_template_kwargs` = {wanted}, got "
            f"{prior.chat_template_kwargs}: its chats would be other prompts. Pass `chat_template_kwargs` to the "
            "prior's `LanguageModel`."
        )
    policy: Any = trainer.accelerator.unwrap_model(trainer.model)
    if excluded_tokens(base_causal_lm(policy)):
        raise ValueError(
            f"`trainer` must train on text, got a processor of images, {type(trainer.processing_class).__name__}: the "
            "evaluation reads text only. The trainer's own `eval_posterior/…` metrics are of prompts with images."
        )
    accelerator = trainer.accelerator
    plugin = accelerator.state.deepspeed_plugin
    if accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError(
            "`trainer` must hold whole weights on each process, got sharded ones (FSDP or ZeRO-3): completions are "
            "drawn on one. Call `evaluate` on the saved model instead."
        )


def _first_rows(trainer: Any, max_prompts: int) -> tuple[list[Prompt], dict[str, list]]:
    dataset = trainer.eval_dataset
    columns = getattr(dataset, "column_names", None) or []  # a list for one dataset, a dictionary for several
    if "prompt" not in columns or isinstance(columns, dict):
        raise ValueError(
            "`prompts` must be given unless the trainer's `eval_dataset` is one dataset with a column `prompt`, got "
            f"{type(dataset).__name__} with {columns}. Pass `prompts`, and `columns` where the reward asks for some."
        )
    rows = list(dataset.take(max_prompts))
    if not rows:
        raise ValueError(f"`max_prompts` must leave at least one prompt, got {max_prompts} of the `eval_dataset`.")
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return [row["prompt"] for row in rows], columns
