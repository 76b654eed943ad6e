"""What a model has positions for, against a forward pass of it."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from rlhf_bayes.rewards.lengths import LengthLimit, num_positions

SMALL = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (BertConfig(**SMALL, max_position_embeddings=12), 12),
        (GPT2Config(vocab_size=9, n_positions=12, n_embd=8, n_layer=1, n_head=2), 12),
        # the first two positions are those of padding
        (RobertaConfig(**SMALL, max_position_embeddings=14, pad_token_id=1), 12),
    ],
)
def test_one_token_more_than_learnt_positions_fails(config, positions):
    assert num_positions(config) == positions
    config.pad_token_id = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        assert model(torch.full((1, positions), 5)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, positions + 1), 5))


def test_rotary_models_say_how_far_they_were_trained():
    assert num_positions(LlamaConfig(**SMALL, max_position_embeddings=12)) == 12
    assert num_positions(BloomConfig()) is None


def test_the_smaller_limit_is_the_one():
    assert LengthLimit(10, 12).tokens == 10
    assert str(LengthLimit(10, 12)) == "`max_length` = 10 tokens"
    assert LengthLimit(1024, 12).tokens == 12
    assert str(LengthLimit(1024, 12)) == "the model's 12 positions"
    assert LengthLimit(None, 12).by_model
    assert LengthLimit().allows(10**9)
