"""Classifiers as rewards: against one text at a time by hand, and against TRL's own method."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer
from trl import RLOOTrainer
from trl.trainer import rloo_trainer

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.rewards import RewardModel, score

PROMPTS = ["ab", "c", "fade", "b"]
COMPLETIONS = ["cd", "", "deaf", "add"]
CHATS = [[{"role": "user", "content": text}] for text in PROMPTS]
REPLIES = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
IDS = [[1]] * 4


@torch.no_grad()
def one_at_a_time(model, tokenizer, texts):
    """No padding, no batch: what the padded batch must agree with."""
    ids = [tokenizer.convert_tokens_to_ids(list(text)) for text in texts]
    return torch.stack([model.eval()(input_ids=torch.tensor([row])).logits[0, 0] for row in ids])


def trl_rewards(model, tokenizer, prompts, completions, monkeypatch):
    """`RLOOTrainer._calculate_rewards` itself, on a trainer of which only what it reads exists."""
    monkeypatch.setattr(rloo_trainer, "profiling_context", lambda *args: torch.no_grad())
    monkeypatch.setattr(rloo_trainer, "gather", lambda tensor: tensor)
    trainer = object.__new__(RLOOTrainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"))
    trainer.reward_funcs, trainer.reward_processing_classes = [model], [tokenizer]
    trainer.reward_func_names, trainer.chat_template_kwargs = ["model"], {}
    trainer.state = None
    monkeypatch.setattr(Trainer, "_prepare_inputs", lambda self, inputs: inputs)
    inputs = [{"prompt": prompt} for prompt in prompts]
    # unwrapped: the profiler around it wants a whole trainer
    return inspect.unwrap(RLOOTrainer._calculate_rewards)(trainer, inputs, prompts, completions, IDS)


def test_padded_batches_agree_with_single_texts(bert, bert_tokenizer):
    expected = one_at_a_time(bert, bert_tokenizer, ["abcd", "c", "fadedeaf", "badd"])
    assert expected.std() > 0.01
    for batch_size in (1, 3, 64):
        rewards = RewardModel(bert, bert_tokenizer, batch_size=batch_size)(PROMPTS, COMPLETIONS)
        torch.testing.assert_close(torch.tensor(rewards), expected)


def test_eos_stands_in_for_a_missing_padding_token(llama, llama_tokenizer):
    expected = []
    for text in ["abcd", "c", "fadedeaf", "badd"]:
        expected.append(one_at_a_time(llama, llama_tokenizer, [text]))
    reward_model = RewardModel(llama, llama_tokenizer)
    assert llama_tokenizer.pad_token == "$"
    assert llama.config.pad_token_id == llama_tokenizer.eos_token_id
    torch.testing.assert_close(torch.tensor(reward_model(PROMPTS, COMPLETIONS)), torch.cat(expected))


def test_chats_go_through_the_template(llama, llama_tokenizer):
    # a template that closes each message with EOS, which is the padding token as well: the head reads the text before
    # it
    expected = []
    for text in ["uab$acd", "uc$a", "ufade$adeaf", "ub$aadd"]:
        expected.append(one_at_a_time(llama, llama_tokenizer, [text]))
    rewards = RewardModel(llama, llama_tokenizer)(CHATS, REPLIES)
    torch.testing.assert_close(torch.tensor(rewards), torch.cat(expected))


@pytest.mark.parametrize("form", ["text", "chat"])
def test_agrees_with_the_method_of_trl(llama, llama_tokenizer, form, monkeypatch):
    prompts, completions = (PROMPTS, COMPLETIONS) if form == "text" else (CHATS, REPLIES)
    rewards = score(llama, prompts, completions, IDS, reward_processing_classes=llama_tokenizer)
    expected = trl_rewards(llama, llama_tokenizer, prompts, completions, monkeypatch)
    torch.testing.assert_close(rewards, expected)


def test_a_path_brings_its_own_tokenizer(bert, bert_tokenizer, tmp_path):
    path = tmp_path / "nice-reward"
    bert.save_pretrained(path)
    bert_tokenizer.save_pretrained(path)
    reward_model = RewardModel(str(path))
    assert reward_model.__name__ == "nice-reward"
    expected = one_at_a_time(bert, bert_tokenizer, ["abcd", "c", "fadedeaf", "badd"])
    torch.testing.assert_close(torch.tensor(reward_model(PROMPTS, COMPLETIONS)), expected)


def test_dropout_is_off(bert, bert_tokenizer):
    reward_model = RewardModel(bert.train(), bert_tokenizer)
    assert reward_model(PROMPTS, COMPLETIONS) == reward_model(PROMPTS, COMPLETIONS)


def test_a_checkpoint_without_a_head_is_refused(llama_tokenizer, llama, tmp_path):
    LlamaForCausalLM(LlamaConfig(**llama.config.to_dict())).save_pretrained(tmp_path)
    llama_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks score\.weight: these would be drawn at random"):
        RewardModel(str(tmp_path))


def test_a_model_from_nowhere_needs_its_tokenizer(llama):
    with pytest.raises(ValueError, match="`reward_processing_classes` must hold the tokenizer"):
        RewardModel(llama)


def test_a_tokenizer_needs_padding_or_eos(bert, bert_tokenizer):
    bert_tokenizer.pad_token = None
    with pytest.raises(ValueError, match="padding or an EOS token, got neither"):
        RewardModel(bert, bert_tokenizer)


def test_a_module_that_is_no_classifier_is_refused():
    with pytest.raises(TypeError, match="with a `config`, got Linear"):
        RewardModel(nn.Linear(1, 1))


def test_several_labels_are_warned_about(llama, llama_tokenizer):
    model = LlamaForSequenceClassification(LlamaConfig(**llama.config.to_dict() | {"num_labels": 3}))
    with pytest.warns(UserWarning, match="has 3 labels; as in TRL, the first logit"):
        rewards = RewardModel(model, llama_tokenizer)(["ab"], ["c"])
    assert len(rewards) == 1


def test_the_policys_tokenizer_on_a_smaller_model_is_explained(llama, bert_tokenizer):
    assert len(bert_tokenizer) > llama.config.vocab_size
    with pytest.raises(ValueError, match="the model's vocabulary has 11") as caught:
        score(llama, ["xyz"], ["x"], [[1]], reward_processing_classes=bert_tokenizer)
    assert "LlamaForSequenceClassification" in caught.value.__notes__[0]


def test_text_beyond_the_context_is_explained(bert, bert_tokenizer):
    with pytest.raises(ValueError, match="24 tokens; got 25"):
        RewardModel(bert, bert_tokenizer)(["a" * 20], ["b" * 5])


def test_chats_need_a_template(bert, bert_tokenizer):
    with pytest.raises(ValueError, match="`chat_template`"):
        RewardModel(bert, bert_tokenizer)(CHATS, REPLIES)


def test_tilts_a_prior_of_another_tokenizer(toy, bert, bert_tokenizer, tmp_path):
    bert.save_pretrained(tmp_path)
    bert_tokenizer.save_pretrained(tmp_path)
    posterior = LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length).tilt(str(tmp_path), beta=0.5)
    prompt, n = toy.prompts[1], len(toy.completion_ids)
    log_density = posterior.log_density([prompt] * n, completion_ids=toy.completion_ids)
    rewards = one_at_a_time(bert, bert_tokenizer, [prompt + text for text in toy.completions])  # (N,)
    assert len(rewards.unique()) > 10
    torch.testing.assert_close(log_density, toy.log_prior[1] + rewards / 0.5, rtol=0, atol=1e-4)
