"""A saved reward model as plain transformers reads it, and weights that hold a scale, read back as trained."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, pipeline

from rlhf_bayes.rewards import Normalization, RewardEnsemble, RewardIndex, RewardModel, load_reward
from rlhf_bayes.rewards.text_classifier import TextClassifier

from .adapters import COMPLETIONS, PROMPTS, TEXTS, heads, one_at_a_time

SCALE = Normalization((2.5,), (-0.75,), "five texts")


def plain(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def with_bias(bert, bert_tokenizer):
    torch.nn.init.constant_(bert.classifier.bias, 0.4)
    return bert, bert_tokenizer


def test_a_head_with_a_bias_takes_gain_and_bias(with_bias, tmp_path):
    model, tokenizer = with_bias
    reward = RewardModel(model, tokenizer, index=RewardIndex(normalization=SCALE))
    expected = 2.5 * one_at_a_time(model, tokenizer, TEXTS) - 0.75
    reward.save_pretrained(tmp_path)
    assert_close(one_at_a_time(plain(tmp_path), tokenizer, TEXTS), expected)
    assert_close(torch.tensor(reward(PROMPTS, COMPLETIONS)), expected)  # what is in memory stays as it is
    assert_close(torch.tensor(load_reward(tmp_path)(PROMPTS, COMPLETIONS)), expected)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "reward"}
    shown = pipeline("text-classification", str(tmp_path), tokenizer=tokenizer)("abcd")[0]
    assert shown == {"label": "reward", "score": pytest.approx(expected[0].item(), rel=1e-4)}


def test_a_head_without_a_bias_takes_the_gain_and_says_so(llama, llama_tokenizer, tmp_path):
    reward = RewardModel(llama, llama_tokenizer, index=RewardIndex(normalization=SCALE))
    raw = one_at_a_time(llama, llama_tokenizer, TEXTS)
    reward.save_pretrained(tmp_path)
    assert_close(one_at_a_time(plain(tmp_path), llama_tokenizer, TEXTS), 2.5 * raw)
    assert plain(tmp_path).config.id2label == {0: "reward_minus_a_constant"}
    assert_close(torch.tensor(load_reward(tmp_path)(PROMPTS, COMPLETIONS)), 2.5 * raw - 0.75)
    # calibration is that of the raw logits, with whatever class they are read
    assert_close(load_reward(tmp_path).classifier.logits(PROMPTS, COMPLETIONS)[:, 0], raw)
    assert_close(TextClassifier(tmp_path).logits(PROMPTS, COMPLETIONS)[:, 0], raw)


def test_heads_are_no_classes(llama, llama_tokenizer, tmp_path):
    model = heads(llama, 2)
    scale = Normalization((2.0, 3.0), (0.5, -1.0), "five texts")
    raw = torch.stack([one_at_a_time(model, llama_tokenizer, TEXTS, label) for label in range(2)])  # (K, N)
    ensemble = RewardEnsemble(model, llama_tokenizer, index=RewardIndex("heads", ["a", "b"], normalization=scale))
    ensemble.save_pretrained(tmp_path)
    read = plain(tmp_path)
    assert read.config.id2label == {0: "a_reward_minus_a_constant", 1: "b_reward_minus_a_constant"}
    assert read.config.problem_type == "regression"
    for label in range(2):
        assert_close(one_at_a_time(read, llama_tokenizer, TEXTS, label), scale.gain[label] * raw[label])
    again = RewardEnsemble.from_pretrained(tmp_path)
    assert_close(again.member_rewards(PROMPTS, COMPLETIONS), scale.apply(raw))
    assert_close(again.member_logits(PROMPTS, COMPLETIONS), raw)


@pytest.mark.parametrize("biased", [True, False])
def test_a_model_normalised_again_is_folded_from_its_raw_weights(with_bias, llama, llama_tokenizer, tmp_path, biased):
    model, tokenizer = with_bias if biased else (llama, llama_tokenizer)
    raw = one_at_a_time(model, tokenizer, TEXTS)
    RewardModel(model, tokenizer, index=RewardIndex(normalization=SCALE)).save_pretrained(tmp_path / "one")
    again = RewardModel(tmp_path / "one")
    again.normalize(PROMPTS, COMPLETIONS)
    again.save_pretrained(tmp_path / "two")
    expected = (raw - raw.mean()) / raw.std(correction=0)
    assert_close(torch.tensor(load_reward(tmp_path / "two")(PROMPTS, COMPLETIONS)), expected, rtol=1e-4, atol=1e-5)
    read = one_at_a_time(plain(tmp_path / "two"), tokenizer, TEXTS)
    assert_close(read - read.mean(), expected - expected.mean(), rtol=1e-4, atol=1e-5)
    RewardModel(tmp_path / "two").save_pretrained(tmp_path / "three")
    assert_close(one_at_a_time(plain(tmp_path / "three"), tokenizer, TEXTS), read, rtol=1e-4, atol=1e-5)


def test_folders_of_before_give_the_same_rewards(llama, llama_tokenizer, tmp_path):
    llama.save_pretrained(tmp_path)
    llama_tokenizer.save_pretrained(tmp_path)
    fields = {"kind": "single", "members": ["model"], "append_eos": False, "normalization": SCALE.to_dict()}
    (tmp_path / "reward_model.json").write_text(json.dumps(fields))
    raw = one_at_a_time(llama, llama_tokenizer, TEXTS)
    assert_close(torch.tensor(load_reward(tmp_path)(PROMPTS, COMPLETIONS)), 2.5 * raw - 0.75)


def test_what_cannot_be_folded_says_so(llama, llama_tokenizer, tmp_path):
    raw = one_at_a_time(llama, llama_tokenizer, TEXTS)
    RewardModel(llama.bfloat16(), llama_tokenizer, index=RewardIndex(normalization=SCALE)).save_pretrained(tmp_path)
    assert plain(tmp_path).config.id2label == {0: "reward_not_normalized"}
    assert RewardIndex.load(tmp_path).folded == "nothing"
    assert_close(torch.tensor(load_reward(tmp_path)(PROMPTS, COMPLETIONS)), 2.5 * raw - 0.75, rtol=0.1, atol=0.1)


def test_adapters_stay_as_they_are(llama, llama_tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    raw = one_at_a_time(model, llama_tokenizer, TEXTS)
    RewardModel(model, llama_tokenizer, index=RewardIndex(normalization=SCALE)).save_pretrained(tmp_path / "adapter")
    assert RewardIndex.load(tmp_path / "adapter").folded == "nothing"
    assert_close(torch.tensor(load_reward(tmp_path / "adapter")(PROMPTS, COMPLETIONS)), 2.5 * raw - 0.75)
