"""Claim 9, its last part: the script itself compares gradients with backward induction."""


def test_the_mask_gives_the_posterior_over_own_tokens(run_claim):
    result, rows = run_claim("two_turns", "--seeds", 2, "--steps", 2000)
    assert [statement.verdict for statement in result.statements] == ["agrees"] * 3
    assert len(rows) == 4


def test_too_few_steps_do_not_agree(run_claim):
    result, _ = run_claim("two_turns", "--seeds", 1, "--steps", 5)
    assert result.verdict == "disagrees"
