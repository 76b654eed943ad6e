"""Log-probs, entropies and exact KLs from hidden states, against the model's own logits and scipy."""

import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf_bayes.lm import head
from rlhf_bayes.lm.head import LMHead, token_log_probs_and_entropy, token_log_probs_and_exact_kl

from .families import FAMILIES, tiny_model

N, H, V = 7, 16, 18


def states(seed=0, requires_grad=False):
    return torch.randn(N, H, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def projection(seed=0, bias=False):
    torch.manual_seed(seed)
    return nn.Linear(H, V, bias=bias)


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
    assert not any(column.requires_grad for column in (log_q, entropies, kls))


@pytest.mark.parametrize("frozen", [True, False])
def test_log_probs_beside_exact_kls_have_the_gradient_of_log_probs(frozen):
    hidden, lm_head = states(0).detach().requires_grad_(), LMHead(projection(0).requires_grad_(not frozen), V)
    alone, _ = token_log_probs_and_entropy(hidden, TARGETS, lm_head)
    beside, *_ = token_log_probs_and_exact_kl(hidden, lm_head, states(1), LMHead(projection(1), V), TARGETS)
    assert_close(beside, alone)
    weights = torch.linspace(-1, 2, N)  # (N,)
    (expected,), (found,) = (torch.autograd.grad((column * weights).sum(), hidden) for column in (alone, beside))
    assert_close(found, expected)
    assert expected.abs().max() > 0.01


def test_a_token_of_probability_zero_leaves_entropy_and_kl_finite():
    class Forbidding(nn.Module):
        def forward(self, hidden):
            return torch.where(torch.arange(V) == 3, -torch.inf, hidden[:, :1] * torch.linspace(0, 1, V))

    lm_head = LMHead(Forbidding(), V)
    _, entropies = token_log_probs_and_entropy(states(), TARGETS, lm_head)
    *_, kls = token_log_probs_and_exact_kl(states(), lm_head, states(), lm_head, TARGETS)
    assert entropies.isfinite().all()
    assert_close(kls, torch.zeros(N))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_chunks_change_neither_values_nor_gradients(rows, frozen, monkeypatch):
    results = []
    for elements in (head.MAX_CHUNK_ELEMENTS, rows * V):
        monkeypatch.setattr(head, "MAX_CHUNK_ELEMENTS", elements)
        weight, hidden = projection().requires_grad_(not frozen), states(requires_grad=True)
        log_probs, entropies = token_log_probs_and_entropy(hidden, TARGETS, LMHead(weight, V))
        (log_probs * torch.arange(1.0, N + 1)).sum().backward()
        kls = token_log_probs_and_exact_kl(hidden, LMHead(weight, V), states(1), LMHead(projection(1), V), TARGETS)
        gradients = [hidden.grad] if frozen else [hidden.grad, weight.weight.grad]
        results.append((log_probs.detach(), entropies, *gradients, *kls))
    for plain, chunked in zip(*results, strict=True):
        assert_close(chunked, plain)


@pytest.mark.parametrize("rows", [2, N])
def test_the_gradient_under_a_frozen_head_is_that_of_a_plain_cross_entropy(rows, monkeypatch):
    monkeypatch.setattr(head, "MAX_CHUNK_ELEMENTS", rows * V)
    weight, weights = projection(bias=True), torch.arange(-3.0, N - 3)
    ours, theirs = states(requires_grad=True), states(requires_grad=True)
    logits = 1.5 * torch.tanh(2.0 * weight(theirs) / 1.5) / 0.5
    (weights * -nn.functional.cross_entropy(logits, TARGETS, reduction="none")).sum().backward()
    lm_head = LMHead(weight.requires_grad_(False), V, scale=2.0, softcap=1.5, temperature=0.5)
    log_probs, entropies = token_log_probs_and_entropy(ours, TARGETS, lm_head)
    loss = (weights * log_probs).sum()
    loss.backward(retain_graph=True)
    assert_close(ours.grad, theirs.grad)
    loss.backward()
    assert_close(ours.grad, 2 * theirs.grad)
    assert not entropies.requires_grad


@pytest.mark.parametrize(("frozen", "passes"), [(True, 1), (False, 2)])
def test_the_whole_vocabulary_is_held_for_a_chunk_only(frozen, passes, monkeypatch):
    monkeypatch.setattr(head, "MAX_CHUNK_ELEMENTS", 4 * V)
    seen = []

    class Recording(nn.Linear):
        def forward(self, hidden):
            seen.append(len(hidden))
            return super().forward(hidden)

    lm_head = LMHead(Recording(H, V).requires_grad_(not frozen), V)
    log_probs, _ = token_log_probs_and_entropy(states(requires_grad=True), TARGETS, lm_head)
    assert seen == [4, 3]
    log_probs.sum().backward()
    assert sorted(seen) == sorted([4, 3] * passes)  # a head that learns is run again: nothing is kept


def test_processes_that_share_a_head_use_it_equally_often_and_never_run_backward_within_a_forward(monkeypatch):
    weight, plain = projection(), states(requires_grad=True)
    (token_log_probs_and_entropy(plain, TARGETS, LMHead(weight, V))[0] * torch.arange(1.0, N + 1)).sum().backward()
    weight.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})  # as `fully_shard` does
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, op: count.fill_(3))  # some other has so many
    used = []
    weight.register_forward_hook(lambda module, inputs, output: used.append(torch.is_grad_enabled() and len(output)))
    hidden = states(requires_grad=True)
    log_probs, _ = token_log_probs_and_entropy(hidden, TARGETS, LMHead(weight.requires_grad_(False), V))
    assert used == [3, 2, 2]
    assert "UnderFrozenHead" not in log_probs.grad_fn.name()
    (log_probs * torch.arange(1.0, N + 1)).sum().backward()
    assert_close(hidden.grad, plain.grad)


class Allocations(TorchDispatchMode):
    """Bytes of the tensors made within, but for those as large as the weights, and the most that was alive at once."""

    def __init__(self, weight_size):
        super().__init__()
        self.weight_size, self.made, self.peak = weight_size, {}, 0

    def alive(self):
        return sum(size for storage, size in self.made.values() if not storage.expired())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self.made.keys() and storage.nbytes() != self.weight_size:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.alive())
        return result


@pytest.mark.parametrize("path", ["no gradient", "frozen head", "trained head", "exact KL"])
def test_memory_does_not_grow_with_tokens_times_vocabulary(path, monkeypatch):
    rows, vocabulary = 4, 600
    monkeypatch.setattr(head, "MAX_CHUNK_ELEMENTS", rows * vocabulary)
    chunk = 4 * rows * vocabulary
    ours, other = (nn.Linear(H, vocabulary).requires_grad_(path == "trained head") for _ in range(2))
    peaks = []
    for tokens in (2 * rows, 16 * rows):
        hidden, targets = torch.randn(tokens, H, requires_grad=True), torch.zeros(tokens, dtype=torch.long)
        of_states = 4 * tokens * H
        with Allocations(4 * vocabulary * H) as allocations, torch.set_grad_enabled(path.endswith("head")):
            if path == "exact KL":
                columns = token_log_probs_and_exact_kl(
                    hidden, LMHead(ours, vocabulary), hidden.clone(), LMHead(other, vocabulary), targets
                )
            else:
                columns = token_log_probs_and_entropy(hidden, targets, LMHead(ours, vocabulary))
            assert allocations.alive() <= 2 * of_states  # kept for the backward pass, the columns included
            if path.endswith("head"):
                columns[0].sum().backward()
        assert max(size for _, size in allocations.made.values() if size != of_states) == chunk
        peaks.append(allocations.peak)
    assert peaks[0] <= 3.5 * chunk
    # what is left grows with the hidden states: their gradient, whole and in parts
    assert peaks[1] - peaks[0] <= 3 * 4 * (16 - 2) * rows * H


@pytest.mark.parametrize(
    ("vocabulary", "hidden", "frozen", "learning"), [(8192, 512, 512, 512), (151936, 1024, 64, 256), (2**23, 8, 1, 2)]
)
def test_a_chunk_is_4_million_logits_or_a_share_of_the_heads_weights(vocabulary, hidden, frozen, learning):
    assert head.chunk_rows(vocabulary, hidden, learns=False) == frozen
    assert head.chunk_rows(vocabulary, hidden, learns=True) == learning
    weights = vocabulary * hidden
    assert frozen == 1 or 4 * frozen * vocabulary <= max(2**24, 2 * weights / 8)  # in half precision
    assert 4 * learning * vocabulary <= max(2**24, 4 * weights / 4)


def test_a_head_that_learns_is_read_less_often(monkeypatch):
    monkeypatch.setattr(head, "MAX_CHUNK_ELEMENTS", 1)
    calls = []
    weight = nn.Linear(64, V)
    weight.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    hidden, targets = torch.randn(32, 64, requires_grad=True), torch.zeros(32, dtype=torch.long)
    for learns in (True, False):
        weight.requires_grad_(learns)
        token_log_probs_and_entropy(hidden, targets, LMHead(weight, V))
    with torch.no_grad():
        token_log_probs_and_entropy(hidden, targets, LMHead(weight.requires_grad_(), V))
    assert calls == [16] * 2 + [4] * 8 + [4] * 8


def test_half_precision_is_summed_in_full():
    weight = projection().bfloat16()
    log_probs, entropies = token_log_probs_and_entropy(states().bfloat16(), TARGETS, LMHead(weight, V))
    assert log_probs.dtype == entropies.dtype == torch.float32
    exact = token_log_probs_and_entropy(states(), TARGETS, LMHead(projection(), V))[0]
    assert_close(log_probs, exact, rtol=0, atol=0.05)
