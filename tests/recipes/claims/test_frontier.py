"""Claim 4 at a small size: the slope of the drawn curve is β."""

from itertools import pairwise

import pytest


@pytest.mark.slow
def test_the_slope_of_the_curve_is_beta(run_claim):
    result, rows = run_claim(
        "frontier", "--seeds", 1, "--steps", 1, "--max_prompts", 2, "--draws", 4, "--batch", 8, "--prior_draws", 200
    )
    curve = [row for row in rows if row["run"].startswith("posterior")]
    assert len(curve) >= 4
    for before, after in pairwise(curve):
        slope = (float(after["reward"]) - float(before["reward"])) / (
            float(after["kl_to_prior"]) - float(before["kl_to_prior"])
        )
        high, low = (float(row["run"].split("= ")[1]) for row in (before, after))
        assert low < slope < high  # concave, with derivative β
    assert sum("is not above the posteriors" in statement.text for statement in result.statements) >= 6
    assert {row["run"] for row in rows} >= {"ppo", "rloo", "log-variance", "best of 4"}
