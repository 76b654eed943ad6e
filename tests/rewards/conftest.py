"""Tiny classifiers and tokenizers, built here: two families, two vocabularies."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def char_tokenizer(characters: str, **special_tokens) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character, in the order given; everything else is `?`."""
    vocabulary = {token: index for index, token in enumerate([*special_tokens.values(), *characters, "?"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **special_tokens)


@pytest.fixture
def llama_tokenizer():
    """No padding token: EOS is to take its place."""
    tokenizer = char_tokenizer("abcdefuy", bos_token="<s>", eos_token="$")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def llama(llama_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(llama_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        initializer_range=0.5,
        pad_token_id=None,
    )
    return LlamaForSequenceClassification(config)


@pytest.fixture
def bert_tokenizer():
    """Another order of the characters, another size, a padding token of its own."""
    return char_tokenizer("fedcba xyz", pad_token="[P]", cls_token="[C]", sep_token="[S]")


@pytest.fixture
def bert(bert_tokenizer):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(bert_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        num_labels=1,
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config)
