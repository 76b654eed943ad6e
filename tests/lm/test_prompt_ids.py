"""Prompts reach the model as the trainer's do: what the chat template gets, and no end before a completion."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close

from rlhf_bayes import LanguageModel
from rlhf_bayes.diagnostics import evaluate
from rlhf_bayes.lm.prompt_ids import ends_texts_with_eos
from rlhf_bayes.samplers import ImportanceSampler

from .families import tiny_model, tiny_tokenizer

CHATS = [[{"role": "user", "content": "cd"}], [{"role": "user", "content": "e"}]]


def thinking_tokenizer():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template += "{% if thinking %}fg{% endif %}"
    return tokenizer


def plain_log_prob(model, prompt, completion):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()


def test_what_the_chat_template_gets_is_part_of_the_prompt():
    model, tokenizer = tiny_model("llama"), thinking_tokenizer()
    lm = LanguageModel(model, tokenizer, 3, chat_template_kwargs={"thinking": True})
    completions = [[4, 16], [1, 2, 3]]
    for chat, completion, found in zip(CHATS, completions, lm.log_prob(CHATS, completions), strict=True):
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, thinking=True)
        assert text.endswith("cfg")
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert_close(found, plain_log_prob(model, prompt, completion), rtol=1e-4, atol=1e-4)
    without = LanguageModel(model, tokenizer, 3)
    assert (without.log_prob(CHATS, completions) - lm.log_prob(CHATS, completions)).abs().min() > 1e-2


def test_a_policy_of_other_prompts_is_refused_everywhere():
    model, tokenizer = tiny_model("llama"), thinking_tokenizer()
    prior = LanguageModel(model, tokenizer, 3, chat_template_kwargs={"thinking": True})
    policy = LanguageModel(model, tokenizer, 3)
    posterior = prior.tilt(lambda completions, **columns: [0.0] * len(completions), beta=1.0)
    with pytest.raises(ValueError, match=r"`policy` must draw .* and `chat_template_kwargs`, got .*'thinking': True"):
        evaluate(policy, posterior, CHATS, 2)
    with pytest.raises(ValueError, match=r"`proposal` must draw .* and `chat_template_kwargs`"):
        ImportanceSampler(proposal=policy).sample(posterior, CHATS, 2)


def test_an_end_that_the_tokenizer_puts_after_texts_is_left_out():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert not ends_texts_with_eos(tokenizer)
    plain = tokenizer(["cd", "e<eos>"])["input_ids"]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 16)])
    assert ends_texts_with_eos(tokenizer)
    lm = LanguageModel(model, tokenizer, 3)
    # an end in the text itself stays: it is the user's
    assert lm.prompt_token_ids(["cd", "e<eos>"]) == plain
    (found,) = lm.log_prob(["cd"], [[4, 16]])
    assert_close(found, plain_log_prob(model, plain[0], [4, 16]), rtol=1e-4, atol=1e-4)
