"""The console script: what it prints, and how wrong input ends."""

import json

import pytest

from rlhf_bayes import commands


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
        ([], "required: command, arguments"),
    ],
)
def test_wrong_input_ends_with_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
