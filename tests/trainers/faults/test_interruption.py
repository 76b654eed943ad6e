"""Ctrl-C and SIGTERM leave checkpoints from which the run goes on."""

import signal
import sys
import threading
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from rlhf_bayes.trainers.faults.interruption import finished_before_signals

from ...children import started, wait_until
from ..training import config, trainer

SCRIPT = Path(__file__).parents[1] / "launched.py"


@pytest.mark.processes
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_last_checkpoint_is_usable(toy, tmp_path, name):
    errors = tmp_path / "errors"

    def saves():
        assert process.poll() is None, errors.read_text()[-3000:]
        # the moment that a folder appears is the worst: it is being written, and an older one is to be deleted
        return (tmp_path / "run" / "checkpoint-4").is_dir()

    with started([sys.executable, SCRIPT, tmp_path / "run", "slow"], errors) as process:
        wait_until(saves, [process.pid], [tmp_path])
        process.send_signal(getattr(signal, name))
        wait_until(lambda: process.poll() is not None, [process.pid], [tmp_path])
    assert process.returncode != 0
    last = get_last_checkpoint(str(tmp_path / "run"))
    step = int(last.rsplit("-", 1)[1])
    assert step >= 3
    _, info = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not any(info.values())
    assert (Path(last) / "rollout_state_0.pt").is_file()  # what the critic has learnt
    changes = {"num_generations": 4, "per_device_train_batch_size": 12, "optim": "adamw_torch"}
    resumed = trainer(toy, config(tmp_path / "run", max_steps=step + 2, save_steps=1000, **changes))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == step + 2


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_the_end_of_a_checkpoint(name):
    number, events = getattr(signal, name), []
    before = signal.signal(number, lambda *_: events.append("handled"))
    try:
        with finished_before_signals():
            signal.raise_signal(number)
            events.append("written")
        assert events == ["written", "handled"]
        signal.raise_signal(number)  # the handler is back
        assert events == ["written", "handled", "handled"]
    finally:
        signal.signal(number, before)


def test_other_threads_are_left_alone():
    def save():
        with finished_before_signals():
            done.append(True)

    done = []
    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert done == [True]


def test_an_error_while_writing_comes_through():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="disk full"), finished_before_signals():
        raise OSError("disk full")
    assert signal.getsignal(signal.SIGTERM) is before
