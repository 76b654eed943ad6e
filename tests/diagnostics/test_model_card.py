"""The model card: a header that the hub reads, every section, and code that runs."""

import ast
import re

import pytest
import torch
from huggingface_hub import ModelCard

import rlhf_bayes
from rlhf_bayes import rewards
from rlhf_bayes.diagnostics import PreferenceSummary, reward_model_card
from rlhf_bayes.numerics.calibration import reliability_bins
from rlhf_bayes.rewards import Normalization, RewardIndex

DATA = PreferenceSummary(
    "toy preferences",
    3_008,
    608,
    labels="votes of three annotators",
    split="other pairs of the same prompts",
    num_dropped=12,
    agreement=0.625,
    error_rates={"care|ful": 0.06, "careless": 0.41},
)
SCALE = Normalization((2.0,), (0.5,), "draws")
HEADS = RewardIndex(
    "heads", ["head_0", "head_1"], True, Normalization((2.0, 0.5), (0.25, -1.0), "1,024 completions of the prior")
)
METRICS = {
    "eval_accuracy": 0.7812,
    "eval_accuracy_low": 0.747,
    "eval_accuracy_high": 0.813,
    "eval_ece": 0.031,
    "eval_vote_accuracy": 0.66,
    "eval_vote_ceiling": 0.75,
    "eval_loss": 9.87,
}


@pytest.fixture(scope="module")
def card():
    bins = reliability_bins(torch.tensor([0.6, 0.9]), torch.tensor([1.0, 0.75]), num_bins=4)
    return reward_model_card(
        "me/judge", HEADS, DATA, "org/base", METRICS, bins, "reliability.png", {"num_members": 2, "bootstrap": "pairs"}
    )


def section(card: str, title: str) -> str:
    (text,) = re.findall(rf"^## {title}\n\n(.*?)(?=^## |\Z)", card, flags=re.MULTILINE | re.DOTALL)
    return text


def code(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)


def test_header(card):
    header = ModelCard(card).data
    assert header.library_name == "transformers"
    assert header.base_model == "org/base"
    assert header.pipeline_tag == "text-classification"
    assert {"reward-model", "trl", "rlhf_bayes", "reward-ensemble"} <= set(header.tags)


def test_header_of_adapters_and_of_one_model():
    data = PreferenceSummary("pairs", 10, 0)
    adapters = ModelCard(reward_model_card("a", RewardIndex("lora", ["default", "member_1"]), data, "org/base")).data
    assert adapters.library_name == "peft"
    single = ModelCard(reward_model_card("a", RewardIndex(), data)).data
    assert "reward-ensemble" not in single.tags
    assert single.base_model is None


def test_a_folder_of_this_machine_is_not_told(tmp_path):
    base = tmp_path / "my_base"
    base.mkdir()
    card = reward_model_card("judge", RewardIndex(), PreferenceSummary("pairs", 10, 0), str(base))
    assert str(tmp_path) not in card
    assert "`my_base`" in card
    assert ModelCard(card).data.base_model is None


def test_data(card):
    text = section(card, "Data")
    assert "3,008 for training, 608 held out (other pairs of the same prompts). Left out: 12 pairs." in text
    assert "votes of three annotators" in text
    assert "`num_members`: 2" in text


def test_agreement_gives_the_ceiling(card):
    # a = (1−ε)² + ε² at ε = ¼ is 0.625
    text = section(card, "Agreement of the annotators")
    assert "probability 0.625" in text
    assert "ε = 0.250" in text
    assert "no model can be right" not in text  # the ceiling stands beside the accuracy, from the pairs of that
    alone = reward_model_card("me/judge", HEADS, DATA, "org/base")
    assert "more than 0.750 of single votes" in section(alone, "Agreement of the annotators")
    assert "| care\\|ful | 0.060 |" in text


def test_accuracy_stands_beside_its_ceiling(card):
    text = section(card, "Held-out accuracy")
    assert "On 608 pairs." in text
    assert re.search(r"accuracy on plurality labels \| 0\.781 \(95% interval 0\.747 to 0\.813\)", text)
    assert re.search(r"accuracy on single votes \| 0\.660.*\n.*at most.* \| 0\.750", text)
    assert "9.87" not in text


def test_calibration(card):
    text = section(card, "Calibration")
    assert "error 0.031" in text
    assert "| 0.600 | 1.000 | 0.500 |" in text
    assert "| 0.900 | 0.750 | 0.500 |" in text
    assert "nan" not in text
    assert "![Reliability](reliability.png)" in text


def test_normalisation(card):
    text = section(card, "Normalisation")
    assert "on 1,024 completions of the prior" in text
    assert "| head_1 | 0.5 | -1 |" in text


def test_what_was_not_measured_is_said():
    card = reward_model_card("judge", RewardIndex(), PreferenceSummary("pairs", 10, 0))
    assert "Not measured" in section(card, "Agreement of the annotators")
    assert "Not measured" in section(card, "Held-out accuracy")
    assert "Not measured" in section(card, "Calibration")
    assert "None is stored" in section(card, "Normalisation")
    assert "nan" not in card
    assert "None" not in card.replace("None is stored", "")


def test_agreement_by_chance_sets_no_ceiling():
    card = reward_model_card("judge", RewardIndex(), PreferenceSummary("pairs", 10, 0, agreement=0.48))
    assert "no more than by chance" in section(card, "Agreement of the annotators")


def test_many_annotators_are_summarised():
    rates = {f"worker {row}": row / 100 for row in range(41)}
    text = section(
        reward_model_card("judge", RewardIndex(), PreferenceSummary("pairs", 10, 0, error_rates=rates)),
        "Agreement of the annotators",
    )
    assert "over 41 annotators: median 0.200, one in ten below 0.040, one in ten above 0.360" in text
    assert "worker" not in text


@pytest.mark.parametrize("index", [RewardIndex(), HEADS], ids=["single", "heads"])
def test_the_code_names_what_exists(index):
    blocks = code(reward_model_card("me/judge", index, DATA))
    assert len(blocks) == 2
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = {"rlhf_bayes": rlhf_bayes, "rlhf_bayes.rewards": rewards}[node.module]
                assert all(hasattr(module, alias.name) for alias in node.names)
    assert "'me/judge'" in blocks[0]


def test_end_of_sequence_is_told_where_it_counts(card):
    assert "EOS is appended" in section(card, "How to load")
    assert "EOS" not in reward_model_card("judge", RewardIndex(), DATA)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (RewardIndex(), "give the raw logit; the labels say so. `rlhf-bayes export runs/judge` writes"),
        (RewardIndex(append_eos=True), "with `tokenizer.eos_token` appended to each text"),
        (RewardIndex(normalization=SCALE, folded="gain_and_bias"), "give the normalised reward;"),
        (
            RewardIndex(normalization=SCALE, folded="gain"),
            "without the bias, a constant that no comparison depends on",
        ),
        (RewardIndex(normalization=SCALE), "give the raw logit;"),
        (RewardIndex("lora", ["default", "member_1"]), "`rlhf-bayes export runs/judge --member default` writes one"),
    ],
)
def test_what_plain_transformers_gives_is_told(index, expected):
    assert expected in section(reward_model_card("runs/judge", index, DATA), "In plain transformers")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train": -1}, "`num_train` must be 0 or more, got -1"),
        ({"agreement": 1.2}, r"`agreement` must be in \[0, 1\], got 1.2"),
        ({"error_rates": {"a": float("nan")}}, r"`error_rates\['a'\]` must be in \[0, 1\], got nan"),
    ],
)
def test_bad_summary(change, message):
    with pytest.raises(ValueError, match=message):
        PreferenceSummary(**{"dataset": "pairs", "num_train": 1, "num_eval": 1, **change})


def test_metrics_of_no_pairs_are_refused():
    with pytest.raises(ValueError, match=r"`data.num_eval` must count the held-out pairs .* got 0"):
        reward_model_card("judge", RewardIndex(), PreferenceSummary("pairs", 10, 0), metrics={"accuracy": 0.5})
