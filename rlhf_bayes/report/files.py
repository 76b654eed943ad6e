"""Writes the files that the report reads: the draws of a sampler, and facts about them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_bayes.report.run import DRAWS_FILE, EVALUATION_FILE, PRIOR_FILE, SAMPLING_FILE


def write_sampling(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]],
    sampling: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    prior_rows: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """
    Write draws into a folder, as JSON lines, for `rlhf-bayes report` and for other programs.

    Args:
        folder (`str` or `Path`):
            The folder, which is made if it does not exist.
        rows (`Sequence[Mapping]`):
            A row for each completion, with `prompt` and `completion`, texts or chats; `weight`, its share among the
            completions of its prompt (default: all alike); `reward`; `features`, numbers by name; and any other
            entries. Numbers that are not finite become null.
        sampling (`Mapping`, *optional*):
            The content of `sampling.json`: `beta`, `reward_names`, `settings`, `moments` (the means that features are
            asked to have), and rows of `what_if` and `best_of_n`.
        evaluation (`Mapping`, *optional*):
            The content of `evaluation.json`: numbers, or objects with `mean` and `standard_error` or `low` and `high`.
        prior_rows (`Sequence[Mapping]`, *optional*):
            Completions of the prior, for `prior.jsonl`. The report shows them beside `rows`.

    Returns:
        `Path` of the draws.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draws = folder / DRAWS_FILE
    for path, lines in ((draws, rows), (folder / PRIOR_FILE, prior_rows)):
        if lines is not None:
            texts = (json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in lines)
            path.write_text("".join(texts), encoding="utf-8")
    for name, content in ((SAMPLING_FILE, sampling), (EVALUATION_FILE, evaluation)):
        if content is not None:
            text = json.dumps(_finite(content), ensure_ascii=False, allow_nan=False, indent=1)
            (folder / name).write_text(text + "\n", encoding="utf-8")
    return draws


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
