"""Reads a run from its folder: its log, its samples, its settings and its evaluation."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from rlhf_bayes.report.settings import read_settings

EVALUATION_FILE = "evaluation.json"
SAMPLING_FILE = "sampling.json"
DRAWS_FILE = "draws.jsonl"
PRIOR_FILE = "prior.jsonl"
STORE_FILE = "store.json"  # of a store of completions
_MAX_COMPLETION_FILES = 40
_NOT_FINITE = "not finite"
_WHY_NOT_FINITE = "a completion that the posterior forbids has a log density of −∞"


@final
@dataclass(frozen=True)
class Sample:
    """A completion and its scores."""

    prompt: str
    completion: str
    scores: dict[str, float] = field(default_factory=dict)
    """Rewards by name, in their own units."""
    step: int | None = None
    """Optimizer step at which it was drawn; None for a completion that was drawn after training."""
    weight: float = 1.0
    """Its share among the completions of its prompt; None where all count alike."""


@final
@dataclass(frozen=True)
class Estimate:
    """A number of an evaluation, with what is needed to show it."""

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    trustworthy: bool = True
    reason: str = ""
    """Why it cannot be trusted, or where it comes from."""
    at_least: float | None = None
    """A lower bound, where the value cannot be trusted but a bound is known."""
    at_most: float | None = None
    """An upper bound of the same kind."""

    def __str__(self) -> str:
        if not self.trustworthy:
            bounds = [
                f"{sign} {bound:.2f}".replace("-", "−")
                for sign, bound in (("≥", self.at_least), ("≤", self.at_most))
                if bound is not None
            ]
            if bounds:
                return ", ".join(bounds)
            return _NOT_FINITE if self.reason == _WHY_NOT_FINITE else "not trustworthy"
        if self.low is None or self.high is None:
            return (f"{self.value:.2g}" if abs(self.value) < 0.1 else f"{self.value:.2f}").replace("-", "−")
        width = self.high - self.low
        if width == 0:
            return f"{self.value:.3g}".replace("-", "−")
        digits = 2 if width > 0.02 else min(1 - math.floor(math.log10(width)), 4)  # two digits of the interval's width
        value, low, high = (f"{round(x, digits) + 0.0:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]".replace("-", "−")  # + 0.0: no −0.00


@final
@dataclass(frozen=True)
class Run:
    """One folder: a training run, what a sampler drew, or both."""

    name: str
    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    """`log_history` of the trainer."""
    samples: list[Sample] = field(default_factory=list)
    before: list[Sample] = field(default_factory=list)
    """Completions of the prior, from `prior.jsonl`."""
    settings: dict[str, Any] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    """The numbers of `evaluation.json`. The name of a nested entry is its path, joined by `/`."""
    verdict: str = ""
    """The verdict of `evaluation.json`, in words."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """`sampling.json`, which the recipes and `rlhf-bayes sample` write."""

    @property
    def beta(self) -> float | None:
        """β of the posterior, where it is known and positive."""
        # the evidence of features has no β, whatever the trainer's arguments say, so `sampling.json` comes first
        value = (self.sampling if "beta" in self.sampling else self.settings).get("beta")
        return float(value) if isinstance(value, int | float) and value > 0 else None

    @property
    def reward_names(self) -> list[str]:
        """The reward functions, as TRL logs them."""
        if "reward_names" in self.sampling:
            return sorted(self.sampling["reward_names"])
        names = {key.split("/")[1] for entry in self.history for key in entry if _is_reward_mean(key)}
        return sorted(names)

    def curve(self, *keys: str) -> tuple[list[float], list[list[float]]]:
        """
        Steps at which all keys were logged with finite values, and the values of each key.

        What was logged in evaluation only is found too: `eval_…`, or `eval_posterior_fit/…` of
        [`~rlhf_bayes.diagnostics.PosteriorCallback`]. Trainers log the evidence of features as a reward; since it is
        none, it is left out.
        """
        if self.sampling.get("reward_names") == [] and any(key.startswith("reward") for key in keys):
            return [], [[] for _ in keys]
        in_evaluation = [f"eval_{key}" for key in keys]
        by_callback = [f"eval_posterior_fit/{key.rpartition('/')[2]}" for key in keys]
        for names in (keys, in_evaluation, by_callback):
            rows = [
                (entry["step"], *(entry[name] for name in names))
                for entry in self.history
                if "step" in entry and all(_is_number(entry.get(name)) for name in names)
            ]
            if rows:
                steps, *values = (list(column) for column in zip(*rows, strict=True))
                return steps, values
        return [], [[] for _ in keys]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """
    One run for each folder. Its name is the shortest end of its path that differs from the others.

    Args:
        folders (`Sequence` of `str` or `Path`):
            Output folders of trainers, or of `rlhf-bayes sample`. Of these files, those that exist are read:
            `trainer_state.json` (in the folder or its last `checkpoint-*`), `training_args.bin`,
            `completions/*.parquet` of TRL's `log_completions`, `evaluation.json`, `sampling.json`, `draws.jsonl` and
            `prior.jsonl`. A store of completions is a run too.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if no folder is given, one is given twice or holds nothing to report, or a file cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("`folders` must name at least one folder of a run, got none.")
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(
                f"`folders` must be folders that exist, got {str(path)!r}, which is not one when read from "
                f"{os.getcwd()}. Name the `output_dir` of a run."
            )
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"`folders` must name each folder once, got {[str(path) for path in paths]}.")
    return [_read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if (folder / STORE_FILE).is_file():
        from rlhf_bayes.report.stored_run import stored_run  # torch takes seconds to import, and only a store needs it

        return stored_run(folder, name)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: _number(path.name), reverse=True)
    places = [folder, *checkpoints]
    state = next((place / "trainer_state.json" for place in places if (place / "trainer_state.json").is_file()), None)
    args = next((place / "training_args.bin" for place in places if (place / "training_args.bin").is_file()), None)
    sampling = _read_json(folder / SAMPLING_FILE)
    evaluation = _read_json(folder / EVALUATION_FILE)
    run = Run(
        name=name,
        folder=folder,
        history=[] if state is None else list(_read_json(state).get("log_history", [])),
        samples=_logged_samples(folder / "completions") + _draws(folder / DRAWS_FILE),
        before=_draws(folder / PRIOR_FILE),
        settings={**(read_settings(args) if args else {}), **sampling.get("settings", {})},
        estimates=estimates_of(evaluation),
        verdict=str(evaluation.get("verdict") or ""),
        sampling=sampling,
    )
    if not (run.history or run.samples or run.estimates or run.sampling):
        raise ValueError(
            f"`folders` must hold runs, got {str(folder)!r} with none of `trainer_state.json`, `checkpoint-*/"
            f"trainer_state.json`, `completions/*.parquet`, `{EVALUATION_FILE}`, `{SAMPLING_FILE}`. Name the "
            "`output_dir` of a trainer that saved a checkpoint, or call `trainer.save_state()`."
        )
    return run


def estimates_of(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Estimate]:
    """
    The numbers of an evaluation, by name.

    A number stands alone, or is an object with `mean` (or `value`), with `low` and `high` or `standard_error`, and
    with `trustworthy`, `reason` and `unit` where they are known.
    """
    found: dict[str, Estimate] = {}
    for key, entry in tree.items():
        name = f"{prefix}{key}"
        if _is_number(entry):
            found[name] = Estimate(float(entry))
        elif isinstance(entry, Mapping):
            if not {"mean", "value", "trustworthy"} & entry.keys():
                found |= estimates_of(entry, f"{name}/")
                continue
            value, error = _finite(entry.get("mean", entry.get("value"))), _finite(entry.get("standard_error"))
            low, high = _finite(entry.get("low")), _finite(entry.get("high"))
            trusted = bool(entry.get("trustworthy", True))
            if low is None and value is not None and error is not None:
                low, high = value - 1.96 * error, value + 1.96 * error
            found[name] = Estimate(
                value=math.nan if value is None else value,
                low=low,
                high=high,
                unit=str(entry.get("unit", "")),
                trustworthy=trusted and value is not None,
                reason=str(entry.get("reason") or (_WHY_NOT_FINITE if trusted and value is None else "")),
                at_least=_finite(entry.get("at_least")),
                at_most=_finite(entry.get("at_most")),
            )
    return found


def text_of(conversation: Any) -> str:
    """A prompt or completion as text. A chat becomes its messages, each under its role."""
    if isinstance(conversation, str):
        return conversation
    if isinstance(conversation, list | tuple):
        if len(conversation) == 1 and conversation[0].get("role") == "assistant":
            return str(conversation[0].get("content", ""))
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in conversation)
    return str(conversation)


def _logged_samples(folder: Path) -> list[Sample]:
    files = sorted(folder.glob("completions_*.parquet"), key=lambda path: _number(path.stem))
    if not files:
        return []
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    # a long run has thousands of files: only as many are read as a curve needs, the last one among them
    stride = math.ceil(len(files) / _MAX_COMPLETION_FILES)
    samples = []
    for file in files[::-1][::stride][::-1]:
        try:
            rows = read_table(file).to_pylist()
        except (ArrowException, OSError) as error:
            raise ValueError(f"{str(file)!r} cannot be read: {error}. Remove it to go on without it.") from error
        for row in rows:
            scores = {key: float(value) for key, value in row.items() if key not in _NO_REWARDS and _is_number(value)}
            samples.append(Sample(text_of(row["prompt"]), text_of(row["completion"]), scores, row.get("step")))
    return samples


_NO_REWARDS = {"step", "prompt", "completion", "advantage"}


def _draws(path: Path) -> list[Sample]:
    if not path.is_file():
        return []
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            scores = {"reward": row.get("reward"), **row.get("features", {})}
            samples.append(
                Sample(
                    text_of(row["prompt"]),
                    text_of(row["completion"]),
                    {name: float(score) for name, score in scores.items() if _is_number(score)},
                    weight=float(row.get("weight", 1.0)),
                )
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} must hold a JSON object with `prompt` and `completion` in each line; line {number} "
                f"does not: {error}. Draw again, or remove the file."
            ) from error
    return samples


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} must be JSON, and is not: {error}. Was its writing interrupted?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}.")
    return content


def _names(paths: Sequence[Path]) -> list[str]:
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]


def _number(name: str) -> int:
    digits = name.rpartition("-")[2].rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _is_reward_mean(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith("/mean")
