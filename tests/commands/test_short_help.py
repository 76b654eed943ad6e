"""What `--help` shows exists, with the defaults that a run without flags uses."""

import pytest

from rlhf_bayes import commands
from rlhf_bayes.commands import sample, train_gdc, train_ppo, train_reward
from rlhf_bayes.commands.short_help import SHORT_HELP, short_help

PARSED = {
    "ppo": lambda: train_ppo.parse_arguments([]),
    "gdc": lambda: train_gdc.parse_arguments([]),
    "reward": lambda: train_reward.parse_arguments([]),
    "sample": lambda: (sample.Arguments(),),
}


@pytest.mark.parametrize("command", SHORT_HELP)
def test_flags_exist_and_have_their_defaults(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {name: value for part in PARSED[command]() for name, value in vars(part).items()}
    flags = [flag for group in SHORT_HELP[command].groups.values() for flag in group]
    assert [flag.name for flag in flags if flag.name not in values] == []
    shown = {flag.name: flag.default for flag in flags if flag.default is not None}
    assert shown == {name: str(values[name]) for name in shown}
    assert 15 <= len(flags) <= 26
    assert len({flag.name for flag in flags}) == len(flags)


def test_it_is_what_help_prints(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    commands.main(["ppo", "--help"])
    printed = capsys.readouterr().out
    assert printed == short_help("ppo") + "\n"
    assert len(printed.splitlines()) < 60
    assert max(map(len, printed.splitlines())) <= 100


def test_help_all_lists_all_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(["sample", "--help-all"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--chat_template_kwargs" in printed
    assert "--what_if_beta" in printed
