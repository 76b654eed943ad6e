"""Heads that PEFT switches: KLs are exact, and so never negative."""

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from rlhf_bayes.testing import EnumerableLM

from ..training import config, trainer

KINDS = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": {"embed_tokens": [0, 1], "lm_head": [0, 1]}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_is_exact_and_never_negative(kind, tmp_path):
    toy = EnumerableLM(vocab_size=4, max_completion_length=3)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **KINDS[kind])
    run = trainer(toy, config(tmp_path, max_steps=2, learning_rate=0.5), peft_config=lora)
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    run.model.eval()
    next_tokens = [toy.log_probs(run.model), toy.log_prior]  # (P, N) each, by plain forward passes
    exact = (next_tokens[0].exp() * (next_tokens[0] - next_tokens[1])).sum(-1)  # (P,)
    run.model.train()
    before = [parameter.requires_grad for parameter in run.model.parameters()]
    run.train()
    assert [parameter.requires_grad for parameter in run.model.parameters()] == before
    kl = run.rollouts[0].token_kl
    assert kl is not None
    assert (kl >= -1e-6).all()
    by_prompt = kl.sum(-1).view(len(toy.prompts), -1)
    error = by_prompt.std(-1) / by_prompt.size(1) ** 0.5
    order = sorted(range(len(toy.prompts)), key=lambda p: exact[p])
    assert ((by_prompt.mean(-1).sort().values - exact[order]).abs() < 5 * error.max()).all()
    # and the log-ratio of each completion agrees with the enumeration
    index = {tuple(ids): column for column, ids in enumerate(toy.completion_ids)}
    assert index
    log_ratios = (run.rollouts[0].token_log_probs - run.rollouts[0].ref_token_log_probs).sum(-1)
    table = (next_tokens[0] - next_tokens[1]).flatten()
    for ratio in log_ratios:
        assert_close((table - ratio).abs().min(), torch.tensor(0.0), atol=1e-4, rtol=0)
