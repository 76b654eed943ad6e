"""The bundled model: small, loads, ends its sentences, and has both good and bad things to say."""

from pathlib import Path

import pytest
import torch

from rlhf_bayes import LanguageModel, toy
from rlhf_bayes.toy.generate import write_reviews
from rlhf_bayes.toy.rewards import sentiment
from rlhf_bayes.toy.train_lm import train


@pytest.fixture(scope="module")
def prior():
    return LanguageModel(toy.model_path(), max_completion_length=32, batch_size=128)


@pytest.fixture(scope="module")
def drawn(prior):
    return prior.sample(toy.prompts(), n=8, generator=torch.Generator().manual_seed(0))


def test_size():
    assert sum(file.stat().st_size for file in Path(toy.model_path()).iterdir()) <= 4_000_000


def test_tokenizer(prior):
    tokenizer = prior.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    text = "Zoë's naïve café: 100 % ok?\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_loads_in_fp32(prior):
    assert prior.model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in prior.model.parameters()) < 1_000_000


def test_sentences_end_by_themselves(drawn):
    assert drawn.ended.float().mean() > 0.97
    ended = [text for text, ends in zip(drawn.texts, drawn.ended, strict=True) if ends]
    assert sum(text.endswith(".") for text in ended) > 0.97 * len(ended)


def test_reviews_are_varied_and_balanced(drawn):
    assert len(set(drawn.texts)) > 0.95 * len(drawn)
    scores = torch.tensor([sentiment(text) for text in drawn.texts])
    assert abs(scores.mean()) < 0.15
    assert scores.std() > 0.5


def test_knows_the_grammar(prior):
    texts = [review.text for review in write_reviews(64, seed=99)]
    prompts, ids = [], []
    for text in texts:
        first, *rest = prior.tokenizer(text)["input_ids"]
        prompts.append(prior.tokenizer.decode([first]))
        ids.append([*rest, prior.tokenizer.eos_token_id])
    nats = prior.log_prob(prompts, ids)  # (B,)
    # a unigram model needs some 80
    assert -nats.mean() < 20


def test_prompts_say_nothing_good_or_bad():
    assert len(toy.prompts()) == len(set(toy.prompts())) == 32
    assert {sentiment(prompt) for prompt in toy.prompts()} == {0.0}


def test_training_script_learns():
    model, tokenizer = train(steps=12, batch_size=16, learning_rate=4e-3, vocab_size=400, seed=1)
    ids = torch.tensor([[*tokenizer("The movie was good.")["input_ids"], tokenizer.eos_token_id]])
    assert model(input_ids=ids, labels=ids).loss < 5.5  # nats a token; log 400 = 6.0 before
