"""What a classifier reads: as TRL trains it, and what it cannot read."""

import math

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from rlhf_bayes.rewards import RewardIndex, RewardModel, TextClassifier

from .adapters import COMPLETIONS, PROMPTS, TEXTS, heads, one_at_a_time

CHATS = [[{"role": "user", "content": text}] for text in PROMPTS]
REPLIES = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]


def test_all_logits_of_padded_batches_agree_with_single_texts(llama, llama_tokenizer):
    model = heads(llama, 3)
    expected = torch.stack([one_at_a_time(model, llama_tokenizer, TEXTS, label) for label in range(3)], dim=1)
    for batch_size in (1, 2, 64):
        classifier = TextClassifier(model, llama_tokenizer, batch_size=batch_size)
        assert classifier.num_labels == 3
        logits = classifier.logits(PROMPTS, COMPLETIONS)  # (B, L)
        assert logits.dtype is torch.float32
        assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert classifier.logits([], []).shape == (0, 3)


@pytest.mark.parametrize("form", ["explicit prompt", "implicit prompt", "chat"])
def test_appending_eos_reads_what_reward_trainer_reads(llama, llama_tokenizer, form, tmp_path):
    """The tokens that TRL's RewardTrainer makes of a pair are those that scoring makes of it."""
    llama_tokenizer.pad_token = "?"
    # a tokenizer that puts BOS before a text, as Llama's does
    llama_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", llama_tokenizer.bos_token_id)]
    )
    prompts, completions = (CHATS, REPLIES) if form == "chat" else (PROMPTS, [*COMPLETIONS[:-1], "f$"])
    columns = {"prompt": prompts, "chosen": completions, "rejected": completions[::-1]}
    if form == "implicit prompt":
        columns = {
            name: [p + c for p, c in zip(prompts, columns[name], strict=True)] for name in ("chosen", "rejected")
        }
    args = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = RewardTrainer(llama, args, train_dataset=Dataset.from_dict(columns), processing_class=llama_tokenizer)
    trained = trainer.train_dataset["chosen_ids"]
    classifier = TextClassifier(llama, llama_tokenizer, append_eos=True)
    (inputs,) = classifier.batches(prompts, completions)
    scored = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert scored == list(trained)
    assert scored[0][-1] == llama_tokenizer.eos_token_id
    assert (scored[0][0] == llama_tokenizer.bos_token_id) == (form != "chat")
    # by default as TRL's trainers score: neither
    (inputs,) = TextClassifier(llama, llama_tokenizer).batches(PROMPTS[:1], COMPLETIONS[:1])
    assert inputs["input_ids"].tolist() == [llama_tokenizer.convert_tokens_to_ids(list("abcd"))]


def test_the_index_beside_a_model_is_followed(llama, llama_tokenizer, tmp_path):
    llama_tokenizer.pad_token = "?"
    llama.save_pretrained(tmp_path)
    llama_tokenizer.save_pretrained(tmp_path)
    expected = one_at_a_time(llama, llama_tokenizer, TEXTS)
    assert_close(torch.tensor(RewardModel(tmp_path)(PROMPTS, COMPLETIONS)), expected, rtol=1e-4, atol=1e-5)
    RewardIndex(append_eos=True).save(tmp_path)
    with_eos = one_at_a_time(llama, llama_tokenizer, [text + "$" for text in TEXTS])
    assert (with_eos - expected).abs().min() > 1e-3
    assert_close(torch.tensor(RewardModel(tmp_path)(PROMPTS, COMPLETIONS)), with_eos, rtol=1e-4, atol=1e-5)
    assert TextClassifier(tmp_path).append_eos
    assert not TextClassifier(tmp_path, append_eos=False).append_eos


def test_scoring_gives_the_mode_of_training_back(bert, bert_tokenizer):
    classifier = TextClassifier(bert, bert_tokenizer)
    assert not bert.training
    expected = classifier.logits(PROMPTS, COMPLETIONS)
    bert.train()
    assert_close(classifier.logits(PROMPTS, COMPLETIONS), expected)
    assert bert.training


def test_logits_that_are_not_finite_are_refused(llama, llama_tokenizer):
    model = heads(llama, 3)
    with torch.no_grad():
        model.score.weight[2] = math.nan
    with pytest.raises(
        ValueError, match=r"'LlamaFor.* must give finite logits, got nan from label 2 for completion 0"
    ):
        TextClassifier(model, llama_tokenizer).logits(PROMPTS, COMPLETIONS)


def test_a_text_without_a_token_is_refused(llama, llama_tokenizer):
    with pytest.raises(ValueError, match=r"at least one token .* got none in row 3: \('', ''\)"):
        TextClassifier(llama, llama_tokenizer, batch_size=2).logits(["a", "b", "c", ""], ["", "", "", ""])


def test_arguments_out_of_range_are_refused(llama, bert, bert_tokenizer, llama_tokenizer):
    with pytest.raises(ValueError, match="`batch_size` must be an integer of at least 1, got 0"):
        TextClassifier(llama, llama_tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="`append_eos` needs a tokenizer with an EOS token"):
        TextClassifier(bert, bert_tokenizer, append_eos=True)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        TextClassifier(llama, llama_tokenizer).logits(["a", "b"], ["a"])


def test_labels_of_a_checkpoint(llama, llama_tokenizer, tmp_path):
    model = LlamaForSequenceClassification(LlamaConfig(**llama.config.to_dict() | {"num_labels": 3}))
    model.save_pretrained(tmp_path)
    llama_tokenizer.save_pretrained(tmp_path)
    assert TextClassifier(tmp_path).num_labels == 3
    with pytest.raises(ValueError, match=r"must have 2 labels here, but its checkpoint has 3: score\.weight"):
        TextClassifier(tmp_path, num_labels=2)
