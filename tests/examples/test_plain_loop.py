"""The loop of plain torch comes close to the posterior by each objective, and needs no trainer."""

import ast
from pathlib import Path

import pytest

from ..scripts import loaded_script

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "plain_loop.py"


@pytest.mark.parametrize("objective", ["ppo", "forward_kl", "js", "log_variance"])
def test_it_comes_close_to_the_posterior(objective, capsys):
    with loaded_script(SCRIPT) as script:
        before, after = script.train(objective, steps=100, learning_rate=2e-3)
    assert before > 0.4
    assert after < 0.5 * before
    assert "KL(π‖π*)" in capsys.readouterr().out


def test_it_is_short_and_imports_no_host():
    source = SCRIPT.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 120
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"argparse", "torch", "rlhf_bayes"}
