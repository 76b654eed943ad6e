"""What is said of a checkpoint of another number of processes, or of another engine."""

import logging
from types import SimpleNamespace

import pytest
import torch

from rlhf_bayes.trainers.faults.resuming import check_resumable, load_device


def run(num_processes: int, deepspeed: bool = False, process_index: int = 0) -> SimpleNamespace:
    plugin = object() if deepspeed else None
    return SimpleNamespace(world_size=num_processes, deepspeed_plugin=plugin, process_index=process_index)


@pytest.fixture
def checkpoint(tmp_path):
    """One that so many processes wrote."""

    def write(num_processes: int, deepspeed: bool = False):
        folder = tmp_path / "checkpoint-3"
        folder.mkdir()
        names = [f"rng_state_{rank}.pth" for rank in range(num_processes)] if num_processes > 1 else ["rng_state.pth"]
        for name in names:
            (folder / name).touch()
        if deepspeed:
            (folder / "global_step3").mkdir()
        return folder

    return write


@pytest.mark.parametrize(("num_processes", "deepspeed"), [(1, False), (2, False), (1, True), (2, True)])
def test_nothing_is_said_of_what_fits(checkpoint, caplog, num_processes, deepspeed):
    check_resumable(checkpoint(num_processes, deepspeed), run(num_processes, deepspeed))
    assert caplog.text == ""


@pytest.mark.parametrize(("written", "now", "words"), [(2, 1, "2 processes, this run has 1"), (1, 4, "1 process, ")])
def test_other_processes(checkpoint, caplog, written, now, words):
    folder = checkpoint(written)
    with caplog.at_level(logging.WARNING):
        check_resumable(folder, run(now))
        check_resumable(folder, run(now, process_index=1))
    assert caplog.text.count(words) == 1


def test_without_deepspeed_the_optimizer_starts_anew(checkpoint, caplog):
    check_resumable(checkpoint(2, deepspeed=True), run(2))
    assert "the state of the optimizer starts anew" in caplog.text


def test_deepspeed_cannot_read_what_others_wrote(checkpoint):
    with pytest.raises(ValueError, match="must have been written under DeepSpeed"):
        check_resumable(checkpoint(2), run(2, deepspeed=True))


def test_deepspeed_wants_as_many_processes(checkpoint):
    with pytest.raises(ValueError, match=r"must come from 1 process under DeepSpeed.* from 2: .*Launch 2, or"):
        check_resumable(checkpoint(2, deepspeed=True), run(1, deepspeed=True))


def test_a_cpu_has_no_index_to_load_to():
    assert load_device(torch.device("cpu", 0)) == "cpu"
    assert load_device(torch.device("cuda", 1)) == "cuda:1"
