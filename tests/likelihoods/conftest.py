"""Tiny classifiers that read the texts of the enumerable toy, letter by letter."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast


@pytest.fixture
def reader_tokenizer():
    """A token a character, so that prompt and completion may be joined anywhere."""
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(["<pad>", "?", " ", "a", "b"])}, "?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="?")


@pytest.fixture
def make_classifier(reader_tokenizer):
    """`make_classifier(num_labels, **config)`: random, with opinions."""

    def make(num_labels, **config):
        torch.manual_seed(num_labels)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(
            vocab_size=len(reader_tokenizer),
            initializer_range=0.5,
            pad_token_id=reader_tokenizer.pad_token_id,
            **sizes,
            **({"num_labels": num_labels} | config),
        )
        return LlamaForSequenceClassification(config).eval()

    return make
