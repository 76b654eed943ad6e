"""Claims 9, its first three parts, at a small size."""

import pytest


@pytest.mark.slow
def test_points(run_claim):
    result, rows = run_claim("points", "--seeds", 2, "--steps", 2, "--exact_steps", 200, "--worlds", 2)
    verdicts = {statement.text: statement.verdict for statement in result.statements}
    assert len(rows) == 6
    assert verdicts["natural gradients without a KL term stay among the posteriors: largest distance"] == "agrees"
    # after two steps the policy is still near the prior, which is the posterior of a large β
    assert all(float(row["nearest"]) <= float(row["kl_to_prior"]) + 1e-4 for row in rows)
