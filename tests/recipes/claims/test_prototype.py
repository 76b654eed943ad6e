"""Claim 8 at a small size."""

import pytest


@pytest.mark.slow
def test_prototype(run_claim, capsys):
    flags = ("--seeds", 1, "--steps", 1, "--max_prompts", 2, "--draws", 4, "--batch", 8)
    result, rows = run_claim("prototype", *flags, "--prior_draws", 200, "--sampler_draws", 30, "--wish", 0.5)
    by = {row["by"]: row for row in rows}
    assert set(by) == {"importance", "rejection", "SMC", "ppo", "log-variance"}
    # three ways to the same posterior
    for quantity in ("reward", "satisfied"):
        for other in ("rejection", "SMC"):
            error = float(by["importance"][f"{quantity} error"]) + float(by[other][f"{quantity} error"])
            assert abs(float(by["importance"][quantity]) - float(by[other][quantity])) < 5 * error
    assert float(by["importance"]["satisfied"]) >= 0.5
    # one step trains nothing, so the prediction is not reached
    assert result.verdict != "agrees"
    with pytest.raises(SystemExit):
        run_claim("prototype", *flags, "--prior_draws", 200, "--wish", 1.0)
    assert "`--wish` must be a share" in capsys.readouterr().err
