"""The recipe without arguments but for its sizes: every sampler's means, other β, and the report."""

import json
import re
from pathlib import Path

import pytest

from rlhf_bayes.commands.sample import DEFAULT_SAMPLERS
from rlhf_bayes.toy import model_path

from ..scripts import run_script

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "sample_posterior.py"
PROMPTS, SAMPLES = 2, 48
pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder in which it ran, and what it printed on a terminal of 80 columns."""
    folder = tmp_path_factory.mktemp("recipe")
    flags = ["--max_prompts", PROMPTS, "--num_samples", SAMPLES, "--policy", model_path()]
    return folder / "runs" / "sample", run_script(RECIPE, *flags, cwd=folder, columns=80)


def test_samplers_agree_on_the_posteriors_means(ran):
    output, printed = ran
    table = printed[printed.index("The posterior by each sampler") : printed.index("How they were drawn")]
    rewards = {}
    for name in ("prior", *DEFAULT_SAMPLERS):
        (row,) = re.findall(rf"^ *{name} +(\w+) +(.*)$", table, re.MULTILINE)
        rewards[name] = json.loads((output / name / "evaluation.json").read_text())["reward"]
        shown = f"{rewards[name]['mean']:.3f} ± {rewards[name]['standard_error']:.3f}"
        assert row[1].startswith(shown if rewards[name]["trustworthy"] else "not")
    exact = rewards["rejection"]
    assert exact["mean"] - rewards["prior"]["mean"] > 0.5  # β = 0.25 asks for kind reviews
    for name in DEFAULT_SAMPLERS:
        error = (rewards[name]["standard_error"] ** 2 + exact["standard_error"] ** 2) ** 0.5
        assert abs(rewards[name]["mean"] - exact["mean"]) < 4 * error + 1e-9, name
    assert re.search(r"do they agree\? +p = \d\.\d\d", table)


def test_other_betas_come_first(ran):
    output, printed = ran
    assert printed.index("What if β were another") < printed.index("The posterior by each sampler")
    rows = json.loads((output / "prior" / "sampling.json").read_text())["what_if"]
    assert [row["beta"] for row in rows] == [2, 1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    rewards = [row["reward"] for row in rows]
    assert rewards == sorted(rewards)  # less β, more reward


def test_the_rest_is_in_files(ran):
    output, printed = ran
    for name in ("prior", *DEFAULT_SAMPLERS):
        rows = (output / name / "draws.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(rows) == PROMPTS * SAMPLES
        assert sum(json.loads(row)["weight"] for row in rows) == pytest.approx(PROMPTS)
    assert "KL(policy‖posterior)" in printed
    assert "What if β were another" in (output / "report" / "index.html").read_text(encoding="utf-8")
