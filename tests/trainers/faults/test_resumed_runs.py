"""`resume_from_checkpoint=True` takes the newest checkpoint that was written to the end."""

import os
import re
import resource
import sys

import pytest
import torch

from rlhf_bayes import GDCConfig, GDCTrainer
from rlhf_bayes.testing import toy_reward
from rlhf_bayes.trainers.faults.whole_checkpoints import checkpoints, defect

from ...children import run as run_child
from ..reward.test_reward_checkpoints import make as make_reward
from ..training import QUIET, config, prompts_of, trainer, weights

pytestmark = pytest.mark.slow

STEPS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def make(kind, toy, folder, **changes):
    if kind == "reward":
        return make_reward(toy, folder, "heads", train=False, **STEPS | changes)
    if kind == "ppo":
        args = config(folder, **{"optim": "adamw_torch", "learning_rate": 1e-2} | STEPS | changes)
        return trainer(toy, args, eval_dataset=prompts_of(toy))
    defaults = {
        "beta": 0.5, "max_completion_length": 3, "num_generations": 8, "per_device_train_batch_size": 24,
        "learning_rate": 1e-2, "logging_steps": 1,
    }  # fmt: skip
    args = GDCConfig(str(folder), **defaults | QUIET | STEPS | changes)
    data = {"train_dataset": prompts_of(toy), "processing_class": toy.tokenizer}
    return GDCTrainer(toy.random_policy(noise=0.0), toy_reward, args, **data)


@pytest.mark.parametrize("kind", ["ppo", "gdc", "reward"])
def test_a_checkpoint_that_was_cut_short_is_passed_over(kind, toy, tmp_path, caplog):
    whole = make(kind, toy, tmp_path)
    whole.train()
    assert [defect(folder) for folder in checkpoints(tmp_path).values()] == [None] * 3
    os.truncate(tmp_path / "checkpoint-6" / "optimizer.pt", 100)
    (tmp_path / "checkpoint-4" / "complete.json").unlink()
    resumed = make(kind, toy, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    for step in (4, 6):
        assert f"checkpoint-{step}` is skipped" in caplog.text
    assert_same_weights(resumed, whole)
    # and they have been written again
    assert [defect(folder) for folder in checkpoints(tmp_path).values()] == [None] * 3


def assert_same_weights(first, second):
    expected = weights(second.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(first.model).items())


def test_nothing_of_an_earlier_attempt_is_left_in_a_checkpoint(toy, tmp_path):
    stale = tmp_path / "checkpoint-2" / "rollout_state_1.pt"  # of a run of two processes
    stale.parent.mkdir()
    stale.write_bytes(b"")
    make("ppo", toy, tmp_path).train()
    assert not stale.exists()
    assert defect(stale.parent) is None


def test_older_checkpoints_go_when_the_new_one_is_whole(toy, tmp_path, monkeypatch):
    make("ppo", toy, tmp_path, save_total_limit=1).train()
    assert list(checkpoints(tmp_path)) == [6]
    run = make("ppo", toy, tmp_path, save_total_limit=1, max_steps=8)
    monkeypatch.setattr("rlhf_bayes.trainers._trl.fault_tolerance.seal", fail)
    with pytest.raises(OSError, match="killed"):
        run.train(resume_from_checkpoint=True)
    assert list(checkpoints(tmp_path)) == [6, 8]
    assert run.args.save_total_limit == 1


def fail(*args):
    raise OSError("killed")


@pytest.mark.parametrize("kind", ["ppo", "gdc", "reward"])
def test_a_finished_run_stays_as_it_is(kind, toy, tmp_path):
    # of reward: in the middle of an epoch
    whole = make(kind, toy, tmp_path, max_steps=4)
    whole.train()
    again = make(kind, toy, tmp_path, max_steps=4)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 4
    assert_same_weights(again, whole)


def test_without_a_whole_one_a_run_stops_or_starts_anew(toy, tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint that is known to be whole, got none at all\. .*'auto'"):
        make("ppo", toy, tmp_path).train(resume_from_checkpoint=True)
    run = make("ppo", toy, tmp_path)
    run.train(resume_from_checkpoint="auto")
    assert run.state.global_step == 6
    for folder in checkpoints(tmp_path).values():
        (folder / "complete.json").unlink()
    with pytest.raises(ValueError, match=r"got \['.*checkpoint-2', .*If another trainer wrote one, give its path"):
        make("ppo", toy, tmp_path).train(resume_from_checkpoint="True")  # as a flag gives it


def test_a_path_is_checked(toy, tmp_path):
    make("ppo", toy, tmp_path).train()
    broken = tmp_path / "checkpoint-4"
    (broken / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"written to the end, got .*checkpoint-4`, of which `generation_config.json"):
        make("ppo", toy, tmp_path).train(resume_from_checkpoint=str(broken))
    with pytest.raises(ValueError, match=r"a folder that exists, got '.*checkpoint-5'"):
        make("ppo", toy, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.fixture
def small_disk():
    """A function that lets no file grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["ppo", "gdc", "reward"])
@pytest.mark.parametrize("size", [20_000, 100_000])  # the weights fail, or what is written after them
def test_a_full_disk_leaves_the_checkpoint_before(kind, size, toy, tmp_path, small_disk):
    whole = make(kind, toy, tmp_path / "whole")
    whole.train()
    run = make(kind, toy, tmp_path / "run")
    log = run.log_metric

    def filled_at_step_3(name, value):
        if run.state.global_step == 3:
            small_disk(size)
        log(name, value)

    run.log_metric = filled_at_step_3
    with pytest.raises(Exception, match=r".") as caught:
        run.train()
    notes = "\n".join(caught.value.__notes__)
    assert "checkpoint-4` could not be written, with " in notes
    assert "The last whole checkpoint is" in notes
    assert "checkpoint-2`: go on from it" in notes
    assert list(checkpoints(tmp_path / "run")) == [2]
    small_disk(resource.RLIM_INFINITY)
    resumed = make(kind, toy, tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, whole)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system of 1 MB, as Linux lets users do")
def test_a_disk_that_is_really_full(tmp_path):
    script = tmp_path / "fill.py"
    script.write_text(FILL)
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path / 'disk'} && {sys.executable} {script} {tmp_path / 'disk'}"
    (tmp_path / "disk").mkdir()
    run = run_child(["unshare", "-rm", "sh", "-c", mount])
    if "unshare failed" in run.stderr or "permission denied" in run.stderr:
        pytest.skip(f"users may not mount here: {run.stderr.strip()}")
    assert run.returncode == 1, run.stderr[-3000:]
    free = float(re.search(r"could not be written, with ([\d.]+) MB free on the disk", run.stderr)[1])
    assert free < 0.2
    left = run.stdout.split()
    assert left
    assert f"{left[-1]}`: go on from it with `resume_from_checkpoint=True`" in run.stderr


FILL = """
import sys, traceback
from datasets import Dataset
from rlhf_bayes import PPOConfig, PPOTrainer
from rlhf_bayes.testing import EnumerableLM, toy_reward
from rlhf_bayes.trainers.faults.whole_checkpoints import whole_checkpoints
from pathlib import Path

toy = EnumerableLM(vocab_size=4, max_completion_length=3)
args = PPOConfig(
    sys.argv[1], use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, disable_tqdm=True,
    max_completion_length=3, num_generations=4, per_device_train_batch_size=12, max_steps=20, save_steps=1,
    logging_strategy="no",
)
data = {"train_dataset": Dataset.from_dict({"prompt": toy.prompts}), "processing_class": toy.tokenizer}
trainer = PPOTrainer(toy.random_policy(noise=0.0), toy_reward, args, **data)
try:
    trainer.train()
finally:
    print(*whole_checkpoints(Path(sys.argv[1])).values())
"""
