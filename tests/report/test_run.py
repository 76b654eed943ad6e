"""What is read from a folder, and folders that hold nothing or what cannot be read."""

import json
import math
import zipfile

import pytest
import torch
from transformers import TrainingArguments

from rlhf_bayes.report import read_runs
from rlhf_bayes.report.run import estimates_of, text_of
from rlhf_bayes.report.settings import read_settings


def test_the_last_checkpoint_is_read(training_run):
    (run,) = read_runs([training_run])
    steps, (reward, kl) = run.curve("reward", "posterior/kl_to_prior")
    assert (run.name, len(steps), steps[-1]) == ("ppo", 60, 60)
    assert (reward[-1], kl[-1]) == pytest.approx((1.3, 2.0))
    assert run.reward_names == ["brevity", "sentiment"]
    assert [sample.step for sample in run.samples] == [10, 10, 20, 20, 60, 60]
    assert run.samples[0].scores == {"sentiment": 0.25}


def test_a_state_of_the_folder_itself_comes_first(training_run):
    (training_run / "trainer_state.json").write_text('{"log_history": [{"step": 3, "reward": 1.0}]}')
    assert read_runs([training_run])[0].curve("reward") == ([3], [[1.0]])


def test_curves_keep_the_steps_where_all_was_logged_and_finite(training_run):
    history = [
        {"step": 1, "a": 1.0, "b": 2.0},
        {"step": 2, "a": 1.0},
        {"step": 3, "a": math.nan, "b": 1.0},
        {"step": 4, "eval_c": 7.0},
    ]
    (training_run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (run,) = read_runs([training_run])
    assert run.curve("a", "b") == ([1], [[1.0], [2.0]])
    assert run.curve("c") == ([4], [[7.0]])
    assert run.curve("a", "missing") == ([], [[], []])


def test_names_tell_runs_apart(tmp_path):
    folders = [tmp_path / "a" / "out", tmp_path / "b" / "out", tmp_path / "c"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text('{"log_history": [{"step": 1}]}')
    assert [run.name for run in read_runs(folders[:1])] == ["out"]
    parent = tmp_path.name
    assert [run.name for run in read_runs(folders)] == ["a/out", "b/out", f"{parent}/c"]


def test_sampled_runs_have_weights(sampled_run):
    (run,) = read_runs([sampled_run])
    assert run.beta == 0.5
    assert [sample.weight for sample in run.samples] == [0.0, 0.9, 1.0]
    assert run.settings == {"sampler": "ImportanceSampler", "beta": 0.5}


def test_estimates_of_any_depth():
    found = estimates_of(
        {
            "log_z": {"mean": 2.0, "standard_error": 0.1, "trustworthy": True, "unit": "nats"},
            "kl": {"forward": {"value": 1.0, "low": 0.5, "high": 2.0}},
            "tv": {"mean": None, "trustworthy": False, "reason": "k-hat 0.9"},
            "distinct_2": 0.75,
            "prompts": 16,
            "policy": "a name",
        }
    )
    assert list(found) == ["log_z", "kl/forward", "tv", "distinct_2", "prompts"]
    assert (found["log_z"].low, found["log_z"].high) == pytest.approx((2 - 0.196, 2 + 0.196))
    assert str(found["kl/forward"]) == "1.00 [0.50, 2.00]"
    assert str(found["tv"]) == "not trustworthy"
    assert found["tv"].reason == "k-hat 0.9"
    assert not estimates_of({"gap": {"mean": math.nan, "trustworthy": True}})["gap"].trustworthy


def test_conversations_as_text():
    assert text_of([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]) == (
        "user: Hi\nassistant: Yes"
    )
    assert text_of([{"role": "assistant", "content": "Yes"}]) == "Yes"


def test_settings_are_read_as_they_were_saved(tmp_path):
    args = TrainingArguments(str(tmp_path), learning_rate=3e-4, hub_token="secret", report_to="none", use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    settings = read_settings(tmp_path / "training_args.bin")
    assert settings["class"] == "TrainingArguments"
    assert settings["learning_rate"] == 3e-4
    assert settings["lr_scheduler_type"] == "linear"  # an enumeration
    assert "secret" not in str(settings)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


def test_settings_run_no_code(tmp_path):
    torch.save(Harmful(), tmp_path / "training_args.bin")
    with pytest.raises(SystemExit):
        torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert read_settings(tmp_path / "training_args.bin") == {"class": "exec"}


@pytest.mark.parametrize("content", [b"", b"no archive", "empty archive"])
def test_settings_that_are_none(tmp_path, content):
    path = tmp_path / "training_args.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        zipfile.ZipFile(path, "w").close()
    with pytest.raises(ValueError, match="Remove the file to have a report without settings"):
        read_settings(path)


def test_folders_that_are_none(tmp_path, training_run):
    with pytest.raises(ValueError, match="at least one folder"):
        read_runs([])
    with pytest.raises(FileNotFoundError, match="'nowhere', which is not one when read from"):
        read_runs([training_run, "nowhere"])
    with pytest.raises(ValueError, match="each folder once"):
        read_runs([training_run, training_run / "." / "completions" / ".."])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="with none of `trainer_state"):
        read_runs([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainer_state.json", '{"log_history": [', "must be JSON, and is not.*interrupted"),
        ("trainer_state.json", "[1]", "must hold a JSON object, got list"),
        ("draws.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "line 2 does not"),
        ("completions/completions_00070.parquet", "no table", "completions_00070.parquet' cannot be read"),
    ],
)
def test_files_that_cannot_be_read(training_run, name, content, message):
    (training_run / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_runs([training_run])
