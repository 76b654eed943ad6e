"""
Writes metrics.md and config_fields.md from the records and configurations of the package.

    python docs/records.py
"""

import inspect
import re
from pathlib import Path
from typing import Any

from rlhf_bayes import GDCConfig, PPOConfig, RewardConfig
from rlhf_bayes.diagnostics.callback import PREFIX
from rlhf_bayes.diagnostics.quantities import shown_in
from rlhf_bayes.diagnostics.trainer_metrics import TRAINER_METRICS

DOCS = Path(__file__).resolve().parent


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def metrics_page() -> str:
    """The metrics of the trainers and of the callback."""
    trainers = [(f"`{name}`", metric.unit, metric.meaning) for name, metric in TRAINER_METRICS.items()]
    callback = [
        (f"`{PREFIX}{name}`", quantity.unit or "–", quantity.meaning)
        for name, quantity in shown_in("callback").items()
    ]
    return f"""# Metrics

Written by `python docs/records.py` from the records of the package.

## Of the trainers

TRL's names keep their meaning: `reward` and `reward_std`, `entropy` (nats per token), `clip_ratio/…` (fraction of
tokens; high: lower the learning rate), and so on. New are the following; an evaluation logs
them with `eval_` in front.

{table(("metric", "unit", "how to read it"), trainers)}

## Of `PosteriorCallback`

Measured on completions of its own, by `evaluate`. Each comes with `…_standard_error`, but for measures of texts and
shares. What cannot be trusted is left out; `{PREFIX}trustworthy` (0 or 1) and
`{PREFIX}importance_ess` (completions that count) say so. The last rows show a collapse: compare the
policy's with those of prior and posterior.

{table(("metric", "unit", "how to read it"), callback)}
"""


def fields_page() -> str:
    """The fields that the package adds to TRL's configurations."""
    sections = [section(config) for config in (PPOConfig, GDCConfig, RewardConfig)]
    return f"""# Fields of the configurations

Written by `python docs/records.py` from the `help` of the fields. These are the fields that the package adds to TRL's,
or whose default or meaning it changes; all others are [TRL's](https://huggingface.co/docs/trl). Each is an argument of
the class and a flag of the recipes.

{"".join(sections).rstrip()}
"""


def section(config: type) -> str:
    """The fields of a configuration that this package declares, its own first."""
    # as they are declared: transformers' parser of flags changes `field.type`
    types: dict[str, Any] = {}
    for cls in config.__mro__:
        if cls.__module__.startswith("rlhf_bayes."):
            types = types | {name: of for name, of in inspect.get_annotations(cls).items() if name not in types}
    rows = []
    for name, of in types.items():
        field = config.__dataclass_fields__[name]
        kind = inspect.formatannotation(of).replace("typing.", "").replace(" | ", " or ")
        text = re.sub(r"%%", "%", field.metadata["help"])
        rows.append((f"`{name}`", f"`{kind}`", f"`{field.default!r}`", text))
    base = next(cls for cls in config.__mro__ if cls.__module__.startswith("trl."))
    head = ("field", "type", "default", "meaning")
    return f"## {config.__name__}\n\nOn top of `trl.{base.__name__}`.\n\n{table(head, rows)}\n\n"


PAGES = {"metrics.md": metrics_page, "config_fields.md": fields_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
