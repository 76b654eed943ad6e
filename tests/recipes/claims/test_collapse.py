"""Claim 1 at a small size."""

import math

import pytest

from rlhf_bayes.testing import EnumerableLM

TINY = ("--seeds", 1, "--steps", 2, "--max_prompts", 2, "--draws", 4, "--batch", 8, "--exact_steps", 1)


@pytest.mark.slow
def test_collapse(run_claim):
    result, rows = run_claim("collapse", *TINY, "--word", "was")
    verdicts = {statement.text: statement for statement in result.statements}
    # before the first gradient step nothing has collapsed, and the verdict must say so
    assert verdicts["exactly, β = 0: the most probable completion gets all mass"].verdict == "disagrees"
    kept = verdicts["exactly, β = 0.5: it gets what the posterior gives it"]
    toy = EnumerableLM(vocab_size=6, max_completion_length=3)
    least = [log_prob.exp().max(-1).values.min().item() for log_prob in (toy.log_prior, toy.log_posterior())]
    assert kept.mean == pytest.approx(least[0] - least[1], abs=1e-5)
    assert {row["run"] for row in rows} >= {"PPO, β = 0", "GDC, on condition", "posterior"}
    posterior = [row for row in rows if row["run"] == "posterior"]
    assert len(posterior) == 1
    assert all(float(row["satisfied"]) == 1 and float(row["mentions"]) >= 1 for row in posterior)
    assert all(math.isfinite(float(row["entropy"])) for row in rows)
    assert result.samples["PPO, β = 0"]


@pytest.mark.slow
def test_another_reward_has_no_word_to_mention(run_claim):
    result, rows = run_claim("collapse", *TINY, "--reward", "rlhf_bayes.toy.rewards:sentiment_reward")
    assert not any("mentions" in statement.text for statement in result.statements)
    assert "mentions" not in rows[0]
    for row in rows:
        assert (row["run"] == "posterior") == (row["reward"] == "")
