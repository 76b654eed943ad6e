"""Hashes are the same for the same thing in any form, and others for other things."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf_bayes.rewards.validation import checked
from rlhf_bayes.store.provenance import prior_hash, reward_identity, template_hash, tokenizer_hash, weights_hash

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def reward(completions, **kwargs):
    return [1.0] * len(completions)


def scaled(factor):
    def inner(completions, **kwargs):
        return [factor] * len(completions)

    return inner


class Counting:
    """A reward with a setting."""

    def __init__(self, per_word):
        self.per_word = per_word

    def __call__(self, completions, **kwargs):
        return [self.per_word * len(text.split()) for text in completions]


class WithModel:
    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = nn.Linear(2, 1)


def test_the_base_of_an_adapter_has_the_hash_of_the_plain_model(toy):
    plain = weights_hash(toy.random_policy(noise=0.0))
    assert plain.startswith("float32-")
    assert prior_hash(get_peft_model(toy.random_policy(noise=0.0), LORA)) == plain
    assert weights_hash(toy.random_policy(noise=1e-6)) != plain
    assert weights_hash(toy.random_policy(noise=0.0).bfloat16()).startswith("bfloat16-")


def test_a_frozen_adapter_belongs_to_the_prior(toy):
    torch.manual_seed(0)
    policy = get_peft_model(toy.random_policy(noise=0.0), LORA)
    trainable = prior_hash(policy)
    policy.requires_grad_(False)
    frozen = prior_hash(policy)
    assert frozen != trainable
    with torch.no_grad():
        next(weight for name, weight in policy.named_parameters() if "lora_B" in name).add_(1e-3)
    assert prior_hash(policy) != frozen


def test_a_critic_is_no_part_of_the_prior(toy):
    policy = toy.random_policy(noise=0.0)
    before = weights_hash(policy)
    policy.add_module("critic", nn.Linear(2, 1))
    assert weights_hash(policy) == before


def test_tokenizers(toy, large_toy):
    before = tokenizer_hash(toy.tokenizer)
    toy.tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)  # sets state of the backend
    assert tokenizer_hash(toy.tokenizer) == before
    assert tokenizer_hash(large_toy.tokenizer) != before
    assert template_hash(toy.tokenizer) == template_hash(large_toy.tokenizer, {})
    assert template_hash(toy.tokenizer) != template_hash(toy.tokenizer, {"enable_thinking": False})


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (reward, checked(reward), scaled(1.0)),
        (scaled(1.0), scaled(1.0), scaled(2.0)),
        (Counting(0.5), Counting(0.5), Counting(1.0)),
        (WithModel(0), WithModel(0), WithModel(1)),
        (WithModel(0).model, WithModel(0).model, WithModel(1).model),
    ],
)
def test_rewards(one, same, other):
    assert reward_identity(one) == reward_identity(same)
    assert reward_identity(one) != reward_identity(other)
