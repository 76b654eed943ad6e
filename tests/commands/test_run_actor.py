"""`rlhf-bayes actor`: draws what a learner asks for, ends with it, and refuses wrong flags with a line."""

import sys

import pytest

from rlhf_bayes import commands
from rlhf_bayes.store import CompletionStore, actor
from rlhf_bayes.store.weights_folder import Wanted, WeightsFolder


@pytest.fixture
def flags(toy, tmp_path):
    model = toy.save(tmp_path / "model")
    prompts = [flag for prompt in toy.prompts for flag in ("--prompt", prompt)]
    reward = ["--reward_func", "rlhf_bayes.testing.enumerable:toy_reward", "--max_completion_length", "3"]
    folders = ["--store", str(tmp_path / "store"), "--weights", str(tmp_path / "weights")]
    return ["actor", *folders, "--model_name_or_path", model, *prompts, *reward]


class Asleep:
    """Stands for `time`: the training ends, or Ctrl-C is pressed, when the actor first waits."""

    def __init__(self, event):
        self.event = event

    def monotonic(self):
        return 0.0

    def sleep(self, seconds):
        self.event()


def start(toy, tmp_path):
    folder = WeightsFolder(tmp_path / "weights")
    folder.begin(Wanted("x", num_prompts=3, num_generations=4, max_unread=2))
    folder.push(7, "x", dict(toy.random_policy(noise=0.1).named_parameters()))
    return folder


def test_it_draws_what_is_asked_for_and_ends_with_the_training(toy, tmp_path, flags, monkeypatch, capsys):
    monkeypatch.setattr(actor, "time", Asleep(start(toy, tmp_path).stop))
    commands.main(flags)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"The training has ended. 24 completions were drawn, and are kept in {tmp_path / 'store'}." in printed
    rows = CompletionStore(tmp_path / "store").read()
    assert set(rows["prompt"]) == set(toy.prompts)
    assert set(rows["step"]) == {7}


def test_ctrl_c_says_what_is_kept(toy, tmp_path, flags, monkeypatch, capsys):
    def pressed():
        raise KeyboardInterrupt

    start(toy, tmp_path)
    monkeypatch.setattr(actor, "time", Asleep(pressed))
    with pytest.raises(SystemExit) as ended:
        commands.main(flags)
    assert ended.value.code == 130
    assert "24 completions were drawn. They are kept in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--temperature", "0"], "`--temperature` must be positive"),
        (["--stroe", "x"], "Is --store meant?"),
        (["--vllm"], "`--vllm` must be left out where vLLM is not installed"),
    ],
)
def test_wrong_flags_end_with_a_line(flags, changes, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit) as ended:
        commands.main([*flags, *changes])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
