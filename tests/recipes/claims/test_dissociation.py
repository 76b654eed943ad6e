"""Claim 3 at a small size."""

import pytest


@pytest.mark.slow
def test_dissociation(run_claim):
    result, rows = run_claim("dissociation", "--seeds", 1, "--steps", 3)
    start = [float(row["kl_to_posterior"]) for row in rows if row["step"] == "0"]
    assert len(start) == 6
    assert max(start) - min(start) < 1e-5  # all begin at the prior
    ends = {row["run"]: row for row in rows if row["step"] == "3"}
    assert len(ends) == 6
    assert all(float(row["kl_to_prior"]) > 0 for row in ends.values())
    # three steps are too few to reach anything
    reached = [statement for statement in result.statements if "nears the posterior" in statement.text]
    assert reached
    assert all(statement.verdict != "agrees" for statement in reached)
