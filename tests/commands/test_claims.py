"""`rlhf-bayes claims`: names, help, and what happens when a claim fails."""

import pytest

from rlhf_bayes import commands
from rlhf_bayes.commands import claims


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text('"""A good claim.\n\nText."""\nimport sys\nprint("good", sys.argv[1:])\n')
    (tmp_path / "bad.py").write_text('"""A bad claim."""\nraise RuntimeError("broken")\n')
    monkeypatch.setattr(claims, "_FOLDERS", (tmp_path / "absent", tmp_path))
    monkeypatch.setattr(claims, "_ORDER", ("bad", "good"))


def test_runs_all_with_their_flags_and_says_which_failed(scripts, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(["claims", "--seeds", "2"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "good ['--seeds', '2']" in printed.out
    assert "broken" in printed.err
    assert "Not finished: bad." in printed.err


def test_runs_those_that_are_named(scripts, capsys):
    commands.main(["claims", "good"])
    assert "good []" in capsys.readouterr().out


def test_ctrl_c_says_that_results_are_kept(scripts, tmp_path, capsys):
    (tmp_path / "good.py").write_text('"""A good claim."""\nraise KeyboardInterrupt\n')
    with pytest.raises(SystemExit) as ended:
        commands.main(["claims", "good"])
    assert ended.value.code == 130
    assert "What was measured is kept: the same command goes on." in capsys.readouterr().err


def test_help_names_the_claims(scripts, capsys):
    commands.main(["claims", "--help"])
    assert "A good claim" in capsys.readouterr().out


def test_refuses_an_unknown_name(scripts, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(["claims", "other"])
    assert ended.value.code == 2
    assert "must be one of bad, good, got 'other'" in capsys.readouterr().err


def test_the_repository_has_each_script():
    assert all(script.is_file() and claims._title(script) for script in claims._scripts().values())
