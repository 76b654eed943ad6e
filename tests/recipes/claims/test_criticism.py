"""Claim 6 at a small size: the rule names what the numbers of its table say."""

import pytest


@pytest.mark.slow
def test_criticism(run_claim):
    result, rows = run_claim("criticism", "--seeds", 1, "--steps", 4, "--draws", 60)
    assert len(rows) == 4
    for row in rows:
        if row["share of the gap"] == "":
            assert row["named"] == ""
        elif float(row["share of the gap"]) <= 0.2:
            assert row["named"] == "wrong posterior"
        else:
            rising = float(row["late gain over what is left"]) >= 0.1
            assert row["named"] == ("stopped early" if rising else "family too small")
    # after four steps nothing is reached, so policies with a wrong posterior are not told
    assert result.verdict != "agrees"
