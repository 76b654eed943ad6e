"""The script as a user launches it, with few steps; what it leaves on disk; and what wrong flags end in."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rlhf_bayes import toy
from rlhf_bayes.commands import train_reward
from rlhf_bayes.rewards import RewardEnsemble, RewardIndex, RewardModel, load_reward

from ..scripts import run_script

FOLDER = Path(__file__).resolve().parents[2] / "reward_models"
FEW = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--normalize_samples", "60"]


@pytest.fixture(scope="module")
def script():
    """What the script runs."""
    return train_reward


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Runs main() with flags in an empty folder: a launch is mostly imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        script.main()

    return run


@pytest.fixture
def own_pairs(tmp_path):
    rows = [
        {
            "question": f"The {thing}",
            "better": f" was {good}.",
            "worse": f" was {bad}.",
            "topic": thing,
            "n": [3, 1, 0],
        }
        for thing in ("hotel", "soup", "novel", "phone")
        for good, bad in (("great", "dull"), ("good", "poor"), ("superb", "bad"), ("lovely", "awful"))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset_name", "pairs.jsonl", "--columns", "prompt=question", "chosen=better", "rejected=worse"]


@pytest.mark.processes
@pytest.mark.slow
def test_without_arguments_trains_four_heads_on_the_toy(tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    output = run_script(FOLDER / "train.py", *FEW, cwd=tmp_path, launcher=launcher)
    for expected in ("608 pairs held out", "Δ = 0", "this model", "accuracy"):
        assert expected in output
    folder = tmp_path / "runs" / "reward_model"
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    for part in (
        "4 heads on one trunk",
        "3,008 for training, 608 held out",
        "## Calibration",
        "completions of `model`",
    ):
        assert part in card
    ensemble = RewardEnsemble.from_pretrained(folder)
    assert ensemble.num_members == 4
    # as the prior draws them: the same 48 prompts, other completions than those of the fit
    rows = toy.preferences("test")
    rewards = ensemble.member_rewards(rows["prompt"], rows["chosen"])
    assert rewards.mean(1).abs().max() < 1
    assert ((rewards.std(1) > 0.6) & (rewards.std(1) < 1.5)).all()


def test_own_pairs_with_votes_by_topic(run, own_pairs, tmp_path, capsys):
    run(*own_pairs, "votes=n", "--held_out_by", "topic", "--held_out", 0.25, "--num_members", 1, *FEW)
    output = capsys.readouterr().out
    assert "4 pairs held out" in output
    assert "votes" in output
    model = load_reward(tmp_path / "runs" / "reward_model")
    assert isinstance(model, RewardModel)
    assert model.index.append_eos


def test_lora_members_from_yaml(run, own_pairs, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "use_peft: true\nlora_r: 4\nensemble: lora\nnum_members: 2\nnormalize_on: chosen\noutput_dir: out\n"
        "drop_columns: [n, topic]\n"
    )
    run("--config", "run.yaml", *own_pairs, *FEW)
    index = RewardIndex.load(tmp_path / "out")
    assert (index.kind, index.num_members) == ("lora", 2)
    assert index.normalization.reference == "the column `chosen` of its data"
    ensemble = RewardEnsemble.from_pretrained(tmp_path / "out")
    assert torch.isfinite(ensemble.member_rewards(["The hotel"], [" was great."])).all()


def test_without_normalisation(run, own_pairs, tmp_path):
    run(*own_pairs, "--normalize_on", "none", "--num_members", 1, *FEW)
    assert RewardIndex.load(tmp_path / "runs" / "reward_model").normalization is None
    assert "None is stored" in (tmp_path / "runs" / "reward_model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "some/model"], "`--dataset_name` must be given"),
        (["--normalize_on", "gold"], "`normalize_on` must be 'prior', 'none' or a column"),
        (["--normalize_samples", 1], "`normalize_samples` must be at least 2, got 1"),
        (["--columns", "chosen=better"], "`columns` must name columns of `dataset_name`"),
        (["--num_members", 0], "`num_members` must be a whole number from 1, got 0"),
    ],
)
def test_wrong_flags_end_before_the_model_is_loaded(script, run, monkeypatch, flags, message):
    monkeypatch.setattr(script, "RewardTrainer", lambda **arguments: pytest.fail("a model would be loaded"))
    with pytest.raises(ValueError, match=message):
        run(*flags)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_the_configurations_are_understood(script, monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)  # a folder of this one may hold a run
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), "--bf16", "false", "--use_cpu", "true"])
    parsed = {name: value for part in script.parse_arguments() for name, value in vars(part).items()}
    for name, value in yaml.safe_load(path.read_text()).items():
        assert parsed[name] == value


def lengthened(tmp_path, *rows):
    """Gives these rows, or all, a prompt that the toy has positions for, but not with a long completion."""
    path = tmp_path / "pairs.jsonl"
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows or range(len(pairs)):
        pairs[row]["question"] = "The hotel was" + " very very" * 26
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def test_prompts_too_long_to_normalise_on_cost_no_training(run, own_pairs, tmp_path, caplog):
    lengthened(tmp_path, 0, 5, 6)
    run(*own_pairs, "--num_members", 1, *FEW, "--max_completion_length", 90)
    index = RewardIndex.load(tmp_path / "runs" / "reward_model")
    assert "completions of `model`" in index.normalization.reference
    assert "prompts and a completion of 90 tokens have more tokens than" in caplog.text


def test_prompts_that_are_all_too_long_are_refused_before_the_model_is_loaded(
    script, run, own_pairs, tmp_path, monkeypatch
):
    lengthened(tmp_path)
    monkeypatch.setattr(script, "RewardTrainer", lambda **arguments: pytest.fail("a model would be loaded"))
    with pytest.raises(ValueError, match=r"None is left to draw completions for\. Lower `--max_completion_length`"):
        run(*own_pairs, "--max_completion_length", 90)


def test_texts_too_long_to_score_are_left_out_of_the_normalisation(run, own_pairs, tmp_path, caplog):
    path = tmp_path / "pairs.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"question": "The", "better": " hotel" * 200, "worse": " end.", "n": [1, 0, 0]}) + "\n")
    run(*own_pairs, "--num_members", 1, *FEW, "--normalize_on", "chosen", "--drop_columns", "topic", "n")
    assert RewardIndex.load(tmp_path / "runs" / "reward_model").normalization is not None
    assert "left out of the normalisation" in caplog.text or "are dropped" in caplog.text


def test_a_trained_model_outlives_a_normalisation_that_fails(script, run, own_pairs, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(script, "LanguageModel", fails)
    with pytest.raises(RuntimeError, match="no memory left") as raised:
        run(*own_pairs, "--num_members", 1, *FEW)
    assert "The trained model is in runs/reward_model, with raw rewards" in raised.value.__notes__[0]
    reward = load_reward(tmp_path / "runs" / "reward_model")
    assert torch.tensor(reward(["The hotel"], [" was great."])).isfinite().all()


ANSWERS = [
    ("It was good.", "It was bad."),
    ("Yes, very good.", "No."),
    ("Lovely.", "It was dull."),
    ("Great!", "Awful."),
]


def ultrafeedback():
    """A text as the prompt of whole chats, and columns that nobody needs."""
    rows = []
    for number, (good, bad) in enumerate(ANSWERS * 3):
        asked = {"role": "user", "content": f"Was the hotel number {number} good?"}
        chosen, rejected = ([asked, {"role": "assistant", "content": answer}] for answer in (good, bad))
        scores = {"score_chosen": 8.5, "score_rejected": 4.0}
        rows.append({"prompt": asked["content"], "chosen": chosen, "rejected": rejected, "messages": chosen, **scores})
    return rows


def shp():
    """Two comments on a post, how many liked each, and which is preferred."""
    return [
        {"history": f"Was the hotel number {number} good?", "human_ref_A": f" {good}", "human_ref_B": f" {bad}",
         "labels": 1, "score_A": 5 + number, "score_B": 2, "domain": f"group {number % 3}"}
        for number, (good, bad) in enumerate(ANSWERS * 3)
    ]  # fmt: skip


@pytest.mark.parametrize("dataset", [ultrafeedback, shp])
def test_published_sets_are_brought_to_it_by_flags_alone(run, tmp_path, capsys, dataset):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dataset()))
    flags = ["--chat_template_path", "chat.jinja", "--max_completion_length", 16]
    if dataset is shp:
        columns = ("prompt=history", "chosen=human_ref_A", "rejected=human_ref_B", "votes=score_A,score_B")
        flags = ["--columns", *columns, "--held_out_by", "domain"]
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    run("--dataset_name", "pairs.jsonl", *flags, "--num_members", 1, *FEW)
    assert "pairs held out" in capsys.readouterr().out
    card = (tmp_path / "runs" / "reward_model" / "README.md").read_text()
    assert "RewardModel('runs/reward_model')" in card
    assert "without the bias, a constant that no comparison depends on" in card
    assert ("- Labels: votes" in card) == (dataset is shp)
    # the folder in plain transformers, on the tokens that were trained on
    reward = load_reward(tmp_path / "runs" / "reward_model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "reward_model").eval()
    texts = ["Was it good? It was.", "Was it good? Yes, the hotel was lovely."]
    with torch.no_grad():
        plain = [model(torch.tensor([ids])).logits[0, 0] for ids in reward.classifier.token_ids(["", ""], texts)]
    rewards = torch.tensor(reward(["", ""], texts))
    assert_close(rewards - reward.normalization.bias[0], torch.stack(plain), rtol=1e-4, atol=1e-5)
