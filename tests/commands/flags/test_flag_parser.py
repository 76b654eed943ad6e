"""Lists on the command line and in YAML, and flags that are not known."""

from dataclasses import dataclass, field

import pytest

from rlhf_bayes.commands.flags.flag_parser import FlagParser


@dataclass
class Arguments:
    clip: list[float] | None = field(default=None, metadata={"help": "Two numbers."})
    names: list[str] = field(default_factory=list, metadata={"action": "extend", "help": "Names."})
    beta: float = field(default=0.5, metadata={"help": "A number."})
    # in the order of transformers' own `report_to`, the only one that its parser takes
    trackers: None | str | list[str] = field(default="none", metadata={"help": "One or several."})  # noqa: RUF036
    learning_rate: float = field(default=0.1, metadata={"help": "Another."})


def parsed(*words):
    (args,) = FlagParser((Arguments,), prog="rlhf-bayes test").parse_args_and_config(list(words))
    return args


@pytest.mark.parametrize(
    "words", [["--clip", "-1", "1"], ["--clip", "[-1,1]"], ["--clip=[-1, 1]"], ["--clip", "[-1,", "1]"]]
)
def test_a_list_of_the_command_line(words):
    assert parsed(*words, "--beta", "2") == Arguments(clip=[-1.0, 1.0], beta=2.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clip: [-1, 1]", Arguments(clip=[-1.0, 1.0])),
        ("clip: '[-1, 1]'", Arguments(clip=[-1.0, 1.0])),
        ("clip: 2", Arguments(clip=[2.0])),
        ("names: my_rewards:length", Arguments(names=["my_rewards:length"])),
        ("names: [a, b]", Arguments(names=["a", "b"])),
        ("names: 7\nlearning_rate: 1e-4", Arguments(names=["7"], learning_rate=1e-4)),
        ("clip: null", Arguments()),
    ],
)
def test_a_list_of_a_file(tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(text)
    assert parsed("--config", str(tmp_path / "run.yaml")) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "none"),
        (["--trackers", "wandb"], "wandb"),
        (["--trackers", "wandb", "tensorboard"], ["wandb", "tensorboard"]),
        (["--trackers", "[wandb,tensorboard]"], ["wandb", "tensorboard"]),
    ],
)
def test_a_text_or_a_list(words, expected):
    assert parsed(*words).trackers == expected


def test_a_text_or_a_list_of_a_file(tmp_path):
    for text, expected in (("wandb", "wandb"), ("[wandb, tensorboard]", ["wandb", "tensorboard"])):
        (tmp_path / "run.yaml").write_text(f"trackers: {text}")
        assert parsed("--config", str(tmp_path / "run.yaml")).trackers == expected


def test_other_words_stay_as_they_are():
    words = ["--names", "a:b=0.5", "c,d", "--names", "[e]", "--learning-rate", "0.3"]
    assert parsed(*words) == Arguments(names=["a:b=0.5", "c,d", "e"], learning_rate=0.3)


def test_a_list_that_is_not_closed():
    with pytest.raises(ValueError, match=r"A list must be written as `\[a, b\]`, got '\[a, b'"):
        parsed("--names", "[a,", "b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--learning_rat", "1"],
            "rlhf-bayes test: --learning_rat is not one of the flags. Is --learning_rate meant?",
        ),
        (["--learn", "1"], "--learn is not one of the flags. "),
        (["--xyzzy=1"], "--xyzzy is not one of the flags. `--help` lists those that matter."),
        (["stray"], "unrecognized arguments: stray"),
        (["--beta", "a"], "argument --beta: invalid float value: 'a'"),
    ],
)
def test_wrong_flags_end_with_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(*words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_wrong_name_in_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("learningrate: 1")
    with pytest.raises(ValueError, match=r"names of flags only, got 'learningrate'\. Is --learning_rate meant"):
        parsed("--config", str(tmp_path / "run.yaml"))
