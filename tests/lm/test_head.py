"""Log-probs, entropies and exact KLs from hidden states, against the model's own logits and scipy."""

import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import nn
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf_bayes.lm import LMHead, head, token_log_probs_and_entropy, token_log_probs_and_exact_kl

from .families import FAMILIES, tiny_model

N, H, V = 7, 16, 18


def states(seed=0, requires_grad=False):
    return torch.randn(N, H, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def projection(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(H, V, bias=False)


TARGETS = torch.tensor([0, 3, 17, 5, 5, 9, 1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_logits_are_the_models_own(family, temperature):
    model = tiny_model(family)
    ids = torch.tensor([[1, 5, 2, 9]])
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0]
        expected = (model(ids).logits[0].float() / temperature).log_softmax(-1)
        assert_close(LMHead.of(model, temperature).log_softmax(hidden), expected, rtol=1e-5, atol=1e-5)


def test_a_divisor_of_the_logits_is_a_multiplier_in_one_family():
    sizes = FAMILIES["granite"] | {"logits_scaling": 4.0}
    granite = AutoModelForCausalLM.from_config(CONFIG_MAPPING["granite"](**sizes))
    assert LMHead.of(granite).scale == 0.25
    granite.config.model_type = "hyperclovax"
    assert LMHead.of(granite).scale == 4.0


def test_log_probs_and_entropy_by_scipy():
    weight = projection()
    log_probs, entropies = token_log_probs_and_entropy(states(), TARGETS, LMHead(weight, V))
    probabilities = (states() @ weight.weight.T).softmax(-1).detach()
    assert_close(log_probs.exp(), probabilities[torch.arange(N), TARGETS])
    assert_close(entropies, torch.tensor(scipy_entropy(probabilities.numpy(), axis=-1)))
    assert not entropies.requires_grad


def test_softcap_scale_and_temperature_by_hand():
    lm_head = LMHead(nn.Identity(), 2, scale=2.0, softcap=1.5, temperature=0.5)
    logits = 1.5 * torch.tanh(torch.tensor([2.0, -6.0]) / 1.5) / 0.5
    assert_close(lm_head.log_softmax(torch.tensor([[1.0, -3.0]]))[0], logits.log_softmax(-1))


def test_exact_kl_by_scipy():
    ours, other = projection(0), projection(1)
    log_p, log_q, entropies, kls = token_log_probs_and_exact_kl(
        states(0), LMHead(ours, V), states(1), LMHead(other, V), TARGETS
    )
    p = (states(0) @ ours.weight.T).softmax(-1).detach()
    q = (states(1) @ other.weight.T).softmax(-1).detach()
    assert_close(kls, torch.tensor(scipy_entropy(p.numpy(), q.numpy(), axis=-1)))
    assert_close(log_p.exp(), p[torch.arange(N), TARGETS])
    assert_close(log_q.exp(), q[torch.arange(N), TARGETS])
    assert_close(entropies, torch.tensor(scipy_entropy(p.numpy(), axis=-1)))
    assert not any(column.requires_grad for column in (log_p, log_q, entropies, kls))


def test_a_token_of_probability_zero_leaves_entropy_and_kl_finite():
    class Forbidding(nn.Module):
        def forward(self, hidden):
            return torch.where(torch.arange(V) == 3, -torch.inf, hidden[:, :1] * torch.linspace(0, 1, V))

    lm_head = LMHead(Forbidding(), V)
    _, entropies = token_log_probs_and_entropy(states(), TARGETS, lm_head)
    *_, kls = token_log_probs_and_exact_kl(states(), lm_head, states(), lm_head, TARGETS)
    assert entropies.isfinite().all()
    assert_close(kls, torch.zeros(N))


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_chunks_change_neither_values_nor_gradients(rows, monkeypatch):
    results = []
    for elements in (head.MAX_CHUNK_ELEMENTS, rows * V):
        monkeypatch.setattr(head, "MAX_CHUNK_ELEMENTS", elements)
        weight, hidden = projection(), states(requires_grad=True)
        log_probs, entropies = token_log_probs_and_entropy(hidden, TARGETS, LMHead(weight, V))
        (log_probs * torch.arange(1.0, N + 1)).sum().backward()
        kls = token_log_probs_and_exact_kl(hidden, LMHead(weight, V), states(1), LMHead(projection(1), V), TARGETS)
        results.append((log_probs.detach(), entropies, hidden.grad, weight.weight.grad, *kls))
    for plain, chunked in zip(*results, strict=True):
        assert_close(chunked, plain)


def test_the_whole_vocabulary_is_held_for_a_chunk_only(monkeypatch):
    monkeypatch.setattr(head, "MAX_CHUNK_ELEMENTS", 2 * V)
    seen = []

    class Recording(nn.Linear):
        def forward(self, hidden):
            seen.append(len(hidden))
            return super().forward(hidden)

    log_probs, _ = token_log_probs_and_entropy(states(requires_grad=True), TARGETS, LMHead(Recording(H, V), V))
    assert seen == [2, 2, 2, 1]
    log_probs.sum().backward()
    assert sorted(seen) == sorted([2, 2, 2, 1] * 2)  # recomputed, not kept


def test_half_precision_is_summed_in_full():
    weight = projection().bfloat16()
    log_probs, entropies = token_log_probs_and_entropy(states().bfloat16(), TARGETS, LMHead(weight, V))
    assert log_probs.dtype == entropies.dtype == torch.float32
    exact = token_log_probs_and_entropy(states(), TARGETS, LMHead(projection(), V))[0]
    assert_close(log_probs, exact, rtol=0, atol=0.05)
