"""Reward models on pairs, read back as in training, and the best of n by them."""

import math

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_bayes import RewardConfig, RewardTrainer, toy
from rlhf_bayes.rewards import RewardEnsemble, RewardIndex, RewardModel
from rlhf_bayes.trainers.reward.held_out import HeldOutRewards, best_of_n, held_out_rewards, raw_member_rewards

PLAIN = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(toy.model_path())


def classifier(num_labels):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(toy.model_path(), num_labels=num_labels)


@pytest.mark.slow
@pytest.mark.parametrize("num_members", [1, 3])
def test_a_saved_and_normalised_model_gives_the_rewards_of_the_trainers_evaluation(tmp_path, num_members):
    pairs = toy.preferences("test").select(range(24))
    config = RewardConfig(str(tmp_path), num_members=num_members, max_steps=2, learning_rate=1e-3, **PLAIN)
    trainer = RewardTrainer(toy.model_path(), config, train_dataset=pairs, eval_dataset=pairs)
    trainer.train()
    trainer.evaluate()
    trainer.normalize(pairs["prompt"][:], pairs["rejected"][:])
    trainer.save_model()
    loaded = RewardModel(tmp_path) if num_members == 1 else RewardEnsemble.from_pretrained(tmp_path)
    read, expected = held_out_rewards(loaded, pairs), HeldOutRewards(**trainer.evaluation_pairs)
    for name in ("chosen", "rejected", "chosen_prob", "votes"):
        assert_close(getattr(read, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert loaded.index.normalization.gain[0] != pytest.approx(1, abs=0.05)  # else nothing was undone
    for name, value in read.metrics.items():
        assert value == pytest.approx(expected.metrics[name], rel=1e-3, abs=1e-4)


def test_pairs_without_a_prompt_are_read_as_with_it(tokenizer):
    model = RewardModel(classifier(1), tokenizer)
    rows = [{"prompt": "The hotel", "chosen": " was good.", "rejected": " was bad."}]
    joined = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    with_prompt, without = (held_out_rewards(model, Dataset.from_list(data)) for data in (rows, joined))
    assert_close(without.chosen, with_prompt.chosen)
    assert_close(without.rejected, with_prompt.rejected)
    assert with_prompt.chosen_prob is None
    assert with_prompt.target.tolist() == [1.0]


# a prefix that both texts share ends inside a word, before a space, or nowhere
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "Cats sleep ", "rejected": "Dogs bark"},
        {"chosen": "The hotel was good.", "rejected": "The hotel was goofy."},
        {"chosen": "The hotel was good.", "rejected": ""},
        {"chosen": "The hotel was", "rejected": "The hotel was bad."},
        {"chosen": "The hotel", "rejected": "The hotel"},
        {"prompt": "The hotel EOS", "chosen": "", "rejected": " was bad."},
    ],
)
def test_what_was_trained_is_what_is_scored(tmp_path, tokenizer, row):
    row = {name: text.replace("EOS", tokenizer.eos_token) for name, text in row.items()}
    rows = [row, {**row, "rejected": " was dull."}]
    model = classifier(1)
    config = RewardConfig(str(tmp_path), **PLAIN)
    trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    reward = RewardModel(model, tokenizer, index=RewardIndex(append_eos=True))
    judged = held_out_rewards(reward, Dataset.from_list(rows))
    for side in ("chosen", "rejected"):
        for column, ids in enumerate(trainer.train_dataset[f"{side}_ids"]):
            with torch.no_grad():
                expected = model.eval()(torch.tensor([ids])).logits[0, 0]
            assert_close(getattr(judged, side)[0, column], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_long_pairs_are_judged_by_the_rule_of_training(tokenizer, caplog, num_labels):
    model = classifier(num_labels)  # 128 positions
    reward = (RewardModel if num_labels == 1 else RewardEnsemble)(model, tokenizer)
    long = " was good." * 60
    pairs = Dataset.from_list(
        [
            {"prompt": "The hotel", "chosen": " was bad.", "rejected": " was fine."},
            {"prompt": "The hotel", "chosen": long, "rejected": " was fine."},
            {"prompt": "The hotel", "chosen": " was dull.", "rejected": " was fine."},
        ]
    )
    with pytest.raises(ValueError, match=r"1 of 3 pairs .* more than the model's 128 positions: row 1\."):
        held_out_rewards(reward, pairs)
    with pytest.raises(ValueError, match=r"more than `max_length` = 4 tokens: rows 0, 1, 2.*`max_length`"):
        held_out_rewards(reward, pairs, max_length=4)
    kept = held_out_rewards(reward, pairs, overlong="drop")
    assert_close(kept.chosen, held_out_rewards(reward, pairs.select([0, 2])).chosen)
    assert "row 1. They are dropped" in caplog.text
    for max_length, tokens in ((None, 128), (20, 20)):
        cut = held_out_rewards(reward, pairs, max_length, "truncate")
        ids = tokenizer("The hotel" + long, add_special_tokens=False)["input_ids"][-tokens:]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        assert_close(cut.chosen[:, 1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`overlong` must be one of"):
        held_out_rewards(reward, pairs, overlong="cut")


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_columns_that_only_training_reads_are_refused(tokenizer, column):
    rows = Dataset.from_list([{"prompt": "I", "chosen": " am.", "rejected": " was.", column: "{}"}])
    with pytest.raises(ValueError, match=f"must not have the column `{column}`"):
        held_out_rewards(RewardModel(classifier(1), tokenizer), rows)


def test_raw_rewards_are_logits(tokenizer):
    model = classifier(2)
    ensemble = RewardEnsemble(model, tokenizer)
    prompts, texts = ["The movie"] * 3, [" was good.", " was bad.", " was fine."]
    ensemble.normalize(prompts, texts)
    ids = tokenizer([p + t for p, t in zip(prompts, texts, strict=True)], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(ids["input_ids"], attention_mask=ids["attention_mask"]).logits  # (B, K)
    assert_close(raw_member_rewards(ensemble, prompts, texts), logits.T, rtol=1e-4, atol=1e-5)


def test_without_a_model_the_log_loss_is_log_2():
    pairs = HeldOutRewards(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.tensor([0.8, 0.4]))
    assert pairs.without_a_model.metrics["log_loss"] == pytest.approx(math.log(2))
    # p = σ(1) and σ(2): both predict chosen, which has the shares .8 and .4
    assert pairs.bins.weight.sum() == pytest.approx(1)
    filled = pairs.bins.weight > 0
    assert_close(pairs.bins.accuracy[filled].double(), torch.tensor([0.8, 0.4]).double(), rtol=1e-5, atol=1e-6)


def test_margins_are_refused(tokenizer):
    rows = Dataset.from_list([{"prompt": "I", "chosen": " am.", "rejected": " was.", "margin": 1.0}])
    with pytest.raises(ValueError, match="must not have the column `margin`"):
        held_out_rewards(RewardModel(classifier(1), tokenizer), rows)


def test_best_of_n_in_standard_deviations():
    generator = torch.Generator().manual_seed(0)
    gold = torch.randn(400, 8, generator=generator) * 3 + 5
    proxy = gold + torch.randn(400, 8, generator=generator) * 3
    curve = best_of_n(proxy, gold, [1, 2, 8])
    assert curve.root_kl == [0, math.sqrt(math.log(2) - 0.5), math.sqrt(math.log(8) - 7 / 8)]
    assert curve.gold[0] == pytest.approx(0, abs=1e-5)
    # the largest of 2 and of 8 normal draws; gold regresses on the proxy by ρ = 1/√2
    for index, expected in ((1, 1 / math.sqrt(math.pi)), (2, 1.4236)):
        assert curve.proxy[index] == pytest.approx(expected, abs=0.1)
        assert curve.gold[index] == pytest.approx(expected / math.sqrt(2), abs=0.1)


def test_a_reward_without_spread_is_refused():
    with pytest.raises(ValueError, match="`gold` must vary between the draws, got 2"):
        best_of_n(torch.arange(4.0).view(1, 4), torch.full((1, 4), 2.0), [1])


def test_raw_rewards_of_normalised_models_are_logits_too(tokenizer):
    models = [RewardModel(classifier(1), tokenizer) for _ in range(2)]
    prompts, texts = ["The movie"] * 3, [" was good.", " was bad.", " was fine."]
    logits = torch.cat([raw_member_rewards(model, prompts, texts) for model in models])  # (K, B)
    for model in models:
        model.normalize(prompts, texts)
    ensemble = RewardEnsemble(models)
    ensemble.normalize(prompts, texts)
    assert_close(raw_member_rewards(ensemble, prompts, texts), logits)
