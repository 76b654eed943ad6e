"""Writes what the report reads: draws of a sampler, and what is known of them."""

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
    Leave draws in a folder, for `rlhf-bayes report` and for whatever reads JSON lines.

    Args:
        folder (`str` or `Path`):
            Made where missing.
        rows (`Sequence[Mapping]`):
            One for each completion: `prompt` and `completion`, texts or chats; `weight`, its share among those of its
            prompt (default: all alike); `reward`; `features`, numbers by name; and what else there is. Numbers that
            are not finite become null.
        sampling (`Mapping`, *optional*):
            `beta`, `reward_names`, `settings`, `moments` (the means that features are to have), and rows of `what_if`
            and `best_of_n`, into `sampling.json`.
        evaluation (`Mapping`, *optional*):
            Numbers, or objects with `mean` and `standard_error` or `low` and `high`, into `evaluation.json`.
        prior_rows (`Sequence[Mapping]`, *optional*):
            Completions of the prior, to be shown beside those of `rows`, into `prior.jsonl`.

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
