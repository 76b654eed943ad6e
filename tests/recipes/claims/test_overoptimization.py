"""Claim 5 at a small size."""

import pytest


@pytest.mark.slow
def test_overoptimization(run_claim):
    result, rows = run_claim("overoptimization", "--seeds", 1, "--steps", 2, "--pairs", 20)
    curves = [row for row in rows if not row["run"].startswith("law")]
    assert {row["run"] for row in curves} == {"one proxy", "mean", "pessimistic", "marginal"}
    assert all(-1 <= float(row["gold"]) <= 1 for row in curves)
    start = {(row["run"], row["seed"]): float(row["reward"]) for row in curves if row["step"] == "0"}
    # min ≤ pessimistic ≤ mean ≤ marginal, on the same completions of the prior
    assert start["pessimistic", "0"] < start["mean", "0"] < start["marginal", "0"]
    assert not any(
        "the law of Gao" in statement.text and statement.verdict == "agrees" for statement in result.statements
    )
