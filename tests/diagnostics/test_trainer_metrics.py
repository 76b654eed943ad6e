"""Metrics of the trainers: each that the code logs has a record, and each record is logged."""

import ast
import re
from pathlib import Path

from rlhf_bayes.diagnostics.trainer_metrics import TRAINER_METRICS

PACKAGE = Path(__file__).parents[2] / "rlhf_bayes"
OURS = re.compile(r"(posterior|ppo|gdc|engine|actors)/\w+|nonfinite_steps|step_kl")


def logged_by(folder: str) -> set[str]:
    """Names of metrics in the code of a part, also those with a part that is filled in, here written as `{}`."""
    names = set()
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                names.add("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
    return {name for name in names if OURS.fullmatch(name.replace("{}", "x"))}


def test_what_the_trainers_log_has_a_record_and_the_other_way_round():
    found = logged_by("objectives") | logged_by("trainers")
    # the f-divergences that are logged, each with its error, and the features of the evidence
    templates = {
        "posterior/{}": {"posterior/forward_kl", "posterior/tv"},
        "posterior/{}_standard_error": {"posterior/forward_kl_standard_error", "posterior/tv_standard_error"},
    }
    for template, names in templates.items():
        assert template in found
        found = found - {template} | names
    assert found == TRAINER_METRICS.keys() - {"posterior/moments/<feature>"}


def test_records_say_how_to_read_a_metric():
    for name, metric in TRAINER_METRICS.items():
        assert metric.unit, name
        assert len(metric.meaning) > 10, name
        assert not metric.meaning.endswith("."), name
