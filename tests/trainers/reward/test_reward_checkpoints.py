"""What a reward trainer saves loads with plain libraries, and a run that is resumed ends where it would have."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rlhf_bayes import RewardTrainer
from rlhf_bayes.rewards import RewardIndex, load_reward

from ..preferring import LORA, hard_pairs, quiet, trained, weights

pytestmark = pytest.mark.slow

KINDS = ("single", "heads", "lora")


def make(toy, folder, kind, train=True, **changes):
    votes = [[3, 1, 0], [1, 2, 1], [0, 4, 0], [2, 0, 0]] * 6
    said = [["chosen"] * c + ["rejected"] * r + ["tie"] * t for c, r, t in votes]
    names = [["u", "v", "w", "x"][: len(row)] for row in said]
    pairs = hard_pairs(toy, 24, votes=votes, annotators=names, annotator_votes=said)
    options = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-2,
        "lr_scheduler_type": "linear", "eval_strategy": "steps", "eval_steps": 4, "per_device_train_batch_size": 4,
        "annotator_reliability": True, "num_members": 1 if kind == "single" else 3,
        "ensemble": "lora" if kind == "lora" else "heads",
    }  # fmt: skip
    args = quiet(folder, ours=True, **options | changes)
    peft_config = LoraConfig(**LORA) if kind == "lora" else None
    return trained(RewardTrainer, toy, args, pairs, eval_dataset=pairs, peft_config=peft_config, train=train)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(toy, tmp_path, kind):
    whole = make(toy, tmp_path / "whole", kind)
    resumed = make(toy, tmp_path / "resumed", kind, train=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.state.global_step == 8
    expected = weights(whole.model)
    for name, weight in weights(resumed.model).items():
        assert torch.equal(weight, expected[name]), name
    trainable = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in resumed.model.named_parameters() if parameter.requires_grad} == trainable
    assert resumed.annotator_error_rates == whole.annotator_error_rates
    assert len(set(whole.annotator_error_rates.values())) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_comes_back_whole(toy, tmp_path, kind):
    # a number that only rises, so that the first checkpoint is the best
    best = {"metric_for_best_model": "eval_num_tokens", "greater_is_better": False, "save_steps": 4}
    trainer = make(toy, tmp_path, kind, load_best_model_at_end=True, **best)
    losses = [entry["eval_log_loss"] for entry in trainer.state.log_history if "eval_log_loss" in entry]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert trainer.evaluate()["eval_log_loss"] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_scores_as_what_was_trained(toy, tmp_path, kind):
    trainer = make(toy, tmp_path / "run", kind, max_steps=2)
    texts = trainer.reward().member_rewards(["a "] * 3, ["b", "a a b", ""])
    trainer.normalize([""] * 24, list(hard_pairs(toy, 24)["chosen"]), "chosen texts")
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_reward(tmp_path / "saved")
    gain = torch.tensor(trainer.normalization.gain)[:, None]
    bias = torch.tensor(trainer.normalization.bias)[:, None]
    assert_close(loaded.member_rewards(["a "] * 3, ["b", "a a b", ""]), gain * texts + bias, rtol=1e-4, atol=1e-4)
    index = RewardIndex.load(tmp_path / "saved")
    assert (index.kind, index.num_members, index.append_eos) == (kind, len(gain), True)
    assert index.normalization.reference == "chosen texts"
    rates = json.loads((tmp_path / "saved" / "annotators.json").read_text())
    assert rates == trainer.annotator_error_rates


def test_heads_load_with_plain_transformers(toy, tmp_path):
    trainer = make(toy, tmp_path / "run", "heads", max_steps=2)
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([toy.tokenizer("a b b" + toy.tokenizer.eos_token)["input_ids"]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    assert_close(logits[0], trainer.reward().member_rewards(["a "], ["b b"])[:, 0])


def test_a_member_loads_with_plain_peft(toy, tmp_path):
    trainer = make(toy, tmp_path / "run", "lora", max_steps=2)
    trainer.save_model(str(tmp_path / "saved"))
    expected = trainer.reward().member_rewards(["a "], ["b b"])[:, 0]
    ids = torch.tensor([toy.tokenizer("a b b" + toy.tokenizer.eos_token)["input_ids"]])
    for member, folder in enumerate(
        (tmp_path / "saved", tmp_path / "saved" / "member_1", tmp_path / "saved" / "member_2")
    ):
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "base", num_labels=1)
        model = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            assert_close(model(input_ids=ids).logits[0, 0], expected[member])


def test_each_checkpoint_has_a_card(toy, tmp_path):
    trainer = make(toy, tmp_path, "heads", annotator_reliability=False, max_length=3)
    trainer.evaluate()
    trainer.create_model_card("judge", "toy votes", tags=["mine"])
    card = ModelCard.load(tmp_path / "README.md")
    assert {"reward-model", "reward-ensemble", "mine"} <= set(card.data.tags)
    text = card.content
    kept = [(chosen, rejected) for chosen, rejected, _ in trainer.train_dataset["votes"]]
    agreeing = sum(chosen * (chosen - 1) + rejected * (rejected - 1) for chosen, rejected in kept)
    meeting = sum((chosen + rejected) * (chosen + rejected - 1) for chosen, rejected in kept)
    assert f"agree with probability {agreeing / meeting:.3f}" in text
    assert f"{len(trainer.train_dataset)} for training, {len(trainer.eval_dataset)} held out" in text
    assert f"Left out: {24 - len(trainer.train_dataset)} pairs" in text
    assert f"{trainer.evaluate()['eval_log_loss']:.3f}" in text


def test_a_run_that_diverged_is_saved_with_a_card(toy, tmp_path):
    args = quiet(tmp_path, ours=True, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = trained(RewardTrainer, toy, args, hard_pairs(toy), train=False)
    trainer.evaluation_pairs = {"chosen": torch.full((1, 3), torch.nan), "rejected": torch.zeros(1, 3)}
    trainer.train()
    assert "## Calibration\n\nNot measured." in (tmp_path / "README.md").read_text()


def test_the_card_counts_the_pairs_of_a_stream(toy, tmp_path):
    args = quiet(tmp_path, ours=True, max_steps=2, gradient_accumulation_steps=3)
    trainer = trained(RewardTrainer, toy, args, hard_pairs(toy, 48).to_iterable_dataset())
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- Pairs: 48 for training" in card
    assert f"RewardModel({str(tmp_path)!r})" in card  # where it can be loaded from


@pytest.mark.parametrize("adapter_first", [True, False])
def test_weights_of_two_runs_in_a_folder_are_not_mistaken(toy, tmp_path, adapter_first):
    for with_adapter in (adapter_first, not adapter_first):
        peft_config = LoraConfig(**LORA) if with_adapter else None
        trained(RewardTrainer, toy, quiet(tmp_path, ours=True), hard_pairs(toy), peft_config=peft_config).save_model()
    with pytest.raises(ValueError, match="holds the weights of both: one of them was left there by an earlier run"):
        load_reward(tmp_path)


@pytest.mark.parametrize("kind", ["heads", "lora"])
def test_an_ensemble_of_another_size_does_not_resume(toy, tmp_path, kind):
    make(toy, tmp_path / "three", kind)
    two = make(toy, tmp_path / "two", kind, train=False, num_members=2)
    with pytest.raises(ValueError, match=rf"must hold the ensemble that is trained, 2 × {kind}, got 3 × {kind}"):
        two.train(resume_from_checkpoint=str(tmp_path / "three" / "checkpoint-5"))
