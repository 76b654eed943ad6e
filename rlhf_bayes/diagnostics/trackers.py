"""Tables and figures for the trackers that `report_to` names, each by its own calls."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from rlhf_bayes.diagnostics.evaluate import Evaluation
from rlhf_bayes.diagnostics.over_prompts import Estimate
from rlhf_bayes.diagnostics.quantities import shown_in

if TYPE_CHECKING:
    from pandas import DataFrame

_SAMPLED_PROMPTS = 16


def log_evaluation(
    trainer: Trainer,
    evaluation: Evaluation,
    figures: Mapping[str, str | Path] | None = None,
    prefix: str = "eval_report/",
) -> None:
    """
    Send an evaluation to the trackers that the trainer's `report_to` names: its numbers, tables and figures.

    Every tracker gets the numbers that can be trusted, for instance `eval/report/policy/gap`. TensorBoard, wandb and
    trackio also get the table of all quantities, completions of prior and policy, and the figures.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, whose callbacks are the trackers. With several processes, call this on the main one.
        evaluation ([`Evaluation`]):
            What to send.
        figures (`Mapping[str, str | Path]`, *optional*):
            name -> image file.
        prefix (`str`):
            What the names begin with.
    """
    numbers = {}
    for distribution, fit in (("prior", evaluation.prior), ("policy", evaluation.policy)):
        for name in shown_in("terminal"):
            estimate: Estimate | None = getattr(fit, name)
            if estimate is not None and estimate.trustworthy and math.isfinite(estimate.mean):
                numbers[f"{prefix}{distribution}/{name}"] = estimate.mean
    tables = {f"{prefix}quantities": evaluation.to_pandas(), f"{prefix}samples": _samples(evaluation)}
    log_to_trackers(trainer, numbers, tables, {f"{prefix}{name}": path for name, path in (figures or {}).items()})


def log_to_trackers(
    trainer: Trainer,
    numbers: Mapping[str, float] | None = None,
    tables: "Mapping[str, DataFrame] | None" = None,
    figures: Mapping[str, str | Path] | None = None,
) -> None:
    """
    Send numbers, tables and figures to the trackers of a trainer, at its current step. Call it on the main process.

    trackio closes a run when its training ends, and finds it again by the `run_name` of the training's configuration.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, whose callbacks are the trackers.
        numbers (`Mapping[str, float]`, *optional*):
            name -> number, for every tracker.
        tables (`Mapping[str, DataFrame]`, *optional*):
            name -> table, for TensorBoard, wandb and trackio.
        figures (`Mapping[str, str | Path]`, *optional*):
            name -> image file, for the same.
    """
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, kinds):
            continue
        # also without numbers, since this opens a tracker that was closed at the end of the training
        callback.on_log(trainer.args, trainer.state, trainer.control, model=trainer.model, logs=dict(numbers or {}))
        send = _SENDERS.get(type(callback).__name__)
        if send is not None:
            send(callback, dict(tables or {}), dict(figures or {}), trainer.state.global_step)


def _to_tensorboard(callback: Any, tables: "dict[str, DataFrame]", figures: dict, step: int) -> None:
    from matplotlib.image import imread

    writer = callback.tb_writer
    for name, table in tables.items():
        writer.add_text(name, table.to_markdown(index=False), step)
    for name, path in figures.items():
        writer.add_image(name, imread(path), step, dataformats="HWC")
    writer.flush()


def _to_wandb(callback: Any, tables: "dict[str, DataFrame]", figures: dict, step: int) -> None:
    import wandb  # pyright: ignore[reportMissingImports]  optional

    wandb.log(
        {name: wandb.Table(dataframe=table) for name, table in tables.items()}
        | {name: wandb.Image(str(path)) for name, path in figures.items()}
        | {"train/global_step": step}
    )


def _to_trackio(callback: Any, tables: "dict[str, DataFrame]", figures: dict, step: int) -> None:
    import trackio  # pyright: ignore[reportMissingImports]  optional

    trackio.log(
        {name: trackio.Table(dataframe=table) for name, table in tables.items()}
        | {name: trackio.Image(str(path)) for name, path in figures.items()}
        | {"train/global_step": step}
    )


_SENDERS: dict[str, Callable[[Any, dict, dict, int], None]] = {
    "TensorBoardCallback": _to_tensorboard,
    "WandbCallback": _to_wandb,
    "TrackioCallback": _to_trackio,
}
"""Class of transformers' callback -> what sends tables and figures."""


def _samples(evaluation: Evaluation) -> "DataFrame":
    """The first completion of the first prompts, before and after training."""
    from pandas import DataFrame

    drawn = (evaluation.from_policy.prompts, evaluation.from_prior.texts, evaluation.from_policy.texts)
    return DataFrame(
        [
            {"prompt": str(prompt), "prior": before[0], "policy": after[0]}
            for prompt, before, after in list(zip(*drawn, strict=True))[:_SAMPLED_PROMPTS]
        ]
    )
