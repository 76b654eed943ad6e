"""Weights appear whole or not at all, and only those of the learner that runs now count."""

import pytest
import torch

from rlhf_bayes.store import weights_folder
from rlhf_bayes.store.weights_folder import Wanted, WeightsFolder

WEIGHTS = {"a": torch.arange(6.0).view(2, 3).T}


def test_what_is_read_is_what_was_pushed(tmp_path):
    folder = WeightsFolder(tmp_path / "weights")
    assert folder.wanted() is None
    assert folder.newest("x") is None
    folder.begin(Wanted("x", 2, 8, 3))
    folder.push(4, "x", WEIGHTS)
    assert WeightsFolder(tmp_path / "weights").wanted() == Wanted("x", 2, 8, 3)
    version = WeightsFolder(tmp_path / "weights").newest("x")
    assert (version.step, version.run) == (4, "x")
    assert torch.equal(version.weights()["a"], WEIGHTS["a"])


def test_half_of_a_version_is_never_read(tmp_path, monkeypatch):
    folder = WeightsFolder(tmp_path)
    folder.push(1, "x", WEIGHTS)

    def killed(weights, path):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights_folder, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.push(2, "x", WEIGHTS)
    assert folder.newest("x").step == 1
    assert torch.equal(folder.newest("x").weights()["a"], WEIGHTS["a"])
    folder.begin(Wanted("y", 2, 8, 3))
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_old_versions_go_and_those_of_a_killed_learner_do_not_count(tmp_path):
    folder = WeightsFolder(tmp_path)
    for step in (98, 99, 100):
        folder.push(step, "killed", WEIGHTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-00000099-killed", "version-00000100-killed"]
    assert folder.newest("resumed") is None
    for step in (50, 51):  # from a checkpoint
        folder.push(step, "resumed", WEIGHTS)
        assert folder.newest("resumed").step == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-00000050-resumed", "version-00000051-resumed"]


def test_a_stop_holds_until_a_learner_begins(tmp_path):
    folder = WeightsFolder(tmp_path)
    folder.stop()
    assert folder.stopped
    folder.begin(Wanted("x", 2, 8, 3))
    assert not folder.stopped
