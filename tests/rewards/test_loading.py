"""What is loaded from disk, against plain transformers."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from rlhf_bayes.rewards import RewardIndex, load_reward

from .adapters import COMPLETIONS, PROMPTS, TEXTS, adapters, heads, one_at_a_time, saved_base


@pytest.mark.parametrize("kind", ["single", "heads", "lora"])
def test_a_checkpoint_in_half_precision_is_scored_in_full(llama, llama_tokenizer, tmp_path, kind):
    if kind == "lora":
        adapters(saved_base(llama.bfloat16(), llama_tokenizer, tmp_path / "base", causal=False), 2).save_pretrained(
            tmp_path
        )
        index = RewardIndex("lora", ["default", "member_1"])
    else:
        model = llama if kind == "single" else heads(llama, 2)
        model.bfloat16().save_pretrained(tmp_path)
        index = RewardIndex() if kind == "single" else RewardIndex("heads", ["head_0", "head_1"])
    llama_tokenizer.save_pretrained(tmp_path)
    index.save(tmp_path)
    if kind == "lora":
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, dtype=torch.float32)
        expected = one_at_a_time(PeftModel.from_pretrained(base, tmp_path), llama_tokenizer, TEXTS)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
        expected = one_at_a_time(plain, llama_tokenizer, TEXTS)
    rewards = load_reward(tmp_path).member_rewards(PROMPTS, COMPLETIONS)[0]
    torch.testing.assert_close(rewards, expected)
    half = load_reward(tmp_path, dtype="auto").member_rewards(PROMPTS, COMPLETIONS)[0]
    assert not torch.equal(half, rewards)  # as asked: else the test could not fail
