"""The console script: what it prints, and how wrong input ends."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from rlhf_bayes import commands

from ..children import run


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    history = [{"step": step, "reward": step / 10} for step in range(5)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def test_report(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    commands.main(["report", str(run_folder)])
    assert f"Report in {run_folder / 'report' / 'index.html'}." in capsys.readouterr().out
    commands.main(["report", str(run_folder), "--output_dir", str(tmp_path / "here")])
    assert (tmp_path / "here" / "index.html").is_file()
    assert (tmp_path / "here" / "training.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "rlhf-bayes report: `folders` must be folders that exist, got 'nowhere'"),
        (["report"], "required: DIR"),
        ([], "rlhf-bayes: a command must be given. There are ppo, gdc, reward,"),
        (["smaple"], "rlhf-bayes: 'smaple' is no command. Is sample meant?"),
        (["report", "a", "--output_dri", "b"], "--output_dri is not one of the flags. Is --output_dir meant?"),
        (["report", "a", "--output_dir"], "rlhf-bayes report: argument --output_dir: expected one argument"),
    ],
)
def test_wrong_input_ends_with_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    commands.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name:<8} {command.purpose}" in printed for name, command in commands.COMMANDS.items())


def test_versions_and_devices(capsys):
    commands.main(["env"])
    printed = capsys.readouterr().out
    assert f"trl            {version('trl')}" in printed
    assert "GPUs" in printed


def test_an_error_of_the_users_code_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_test_main.py").write_text(
        "def broken(completions, **columns):\n    raise ValueError('mine')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    flags = ["--num_samples", "4", "--max_prompts", "1", "--sampler", "importance"]
    with pytest.raises(ValueError, match="mine"):
        commands.main(["sample", "--reward_func", "rewards_of_test_main:broken", *flags])


def test_ctrl_c_ends_with_what_is_kept(monkeypatch, capsys):
    def stopped(args):
        stop = KeyboardInterrupt()
        stop.add_note("Kept: runs/x/checkpoint-3.")
        raise stop

    monkeypatch.setattr("rlhf_bayes.commands.environment.run", stopped)
    with pytest.raises(SystemExit) as ended:
        commands.main(["env"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Stopped by Ctrl-C.\nKept: runs/x/checkpoint-3.\n"


@pytest.mark.processes
@pytest.mark.parametrize("command", [[], *([name] for name in commands.COMMANDS)])
def test_help_imports_nothing_of_weight(command):
    code = (
        "import sys\nfrom rlhf_bayes.commands import main\n"
        f"try:\n    main({[*command, '--help']})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'trl', 'matplotlib', 'datasets', 'scipy'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", code], cwd=Path(__file__).parent)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
