"""Draws that are written are read again; numbers that are not finite become null."""

import json
import math

from rlhf_bayes.report import read_runs, write_sampling


def test_what_is_written_is_read(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]},
        {"prompt": "a", "completion": "ünïcode\n", "weight": 0.25, "reward": -math.inf, "log_weight": -math.inf},
    ]
    evaluation = {"reward": {"mean": 1.0, "standard_error": 0.5}, "log_z": {"mean": math.nan}}
    path = write_sampling(tmp_path / "new" / "run", rows, {"beta": 0.5, "what_if": [{"khat": math.inf}]}, evaluation)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    (run,) = read_runs([tmp_path / "new" / "run"])
    assert [(sample.prompt, sample.completion, sample.weight) for sample in run.samples] == [
        ("user: Hi", "Ho", 1.0),
        ("a", "ünïcode\n", 0.25),
    ]
    assert run.samples[1].scores == {}
    assert run.sampling == {"beta": 0.5, "what_if": [{"khat": None}]}
    assert (run.estimates["reward"].value, run.estimates["log_z"].trustworthy) == (1.0, False)
    assert "Infinity" not in (tmp_path / "new" / "run" / "sampling.json").read_text()
    assert json.loads(path.read_text().splitlines()[1])["reward"] is None
