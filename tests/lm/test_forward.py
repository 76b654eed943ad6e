"""One forward that scores: without padding and with it, with a gradient, behind wrappers; and what it leaves alone."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.testing import assert_close

from rlhf_bayes.lm import Critic, enable_completion_scoring, score_completions
from rlhf_bayes.lm.critic import CRITIC
from rlhf_bayes.lm.forward import base_causal_lm, runs_plainly, scatter

from .families import FAMILIES, OTHERS, PADDING_MATTERS, tiny_model

PROMPTS = [[1, 2, 3], [4], [5, 6]]
COMPLETIONS = [[7, 8], [9, 10, 11, 12], [13]]


def padded(rows, left, value=0):
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        where = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, where], mask[row, where] = torch.tensor(tokens), True
    return ids, mask


def batch(value=0):
    return (*padded(PROMPTS, left=True, value=value), *padded(COMPLETIONS, left=False, value=value))


def ready(family="llama", critic=False):
    model = tiny_model(family)
    if critic:
        model.add_module(CRITIC, Critic(16))
        torch.nn.init.normal_(model.critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    enable_completion_scoring(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_those_of_unpadded_rows(family):
    model = ready(family)
    scores = score_completions(model, *batch(), temperature=1.3)
    weights = torch.arange(1.0, 5.0)
    (scores.log_probs * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0.0
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        log_probs = (model(torch.tensor([prompt + completion])).logits[0] / 1.3).log_softmax(-1)
        own = log_probs[range(len(prompt) - 1, len(prompt) + len(completion) - 1)]
        picked = own[range(len(completion)), completion]
        assert_close(scores.log_probs[row, : len(completion)], picked, rtol=1e-4, atol=1e-5)
        assert_close(scores.entropy[row, : len(completion)], -(own.exp() * own).sum(-1), rtol=1e-4, atol=1e-5)
        total = total + (picked * weights[: len(completion)]).sum()
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_what_stands_in_the_padding_does_not_matter():
    model = ready(critic=True)
    first, second = (score_completions(model, *batch(value)) for value in (0, 16))
    for ours, theirs in zip(first[:3], second[:3], strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    mask = batch()[3]
    for column in first[:3]:
        assert (column[~mask] == 0).all()


def test_columns_of_padding_alone_do_not_reach_the_model():
    model = ready(critic=True)
    widths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch()
    wider = (
        *(torch.nn.functional.pad(tensor, (3, 0)) for tensor in (prompt_ids, prompt_mask)),
        *(torch.nn.functional.pad(tensor, (0, 2)) for tensor in (completion_ids, completion_mask)),
    )
    scores, ours = score_completions(model, *wider), score_completions(model, *batch())
    assert widths == [(3, 7), (3, 7)]
    for column, expected in zip(scores[:3], ours[:3], strict=True):
        assert column.shape == (3, 6)
        assert_close(column[:, :4], expected)
        assert (column[:, 4:] == 0).all()


def test_rows_without_completions_are_scored():
    model = ready()
    ids, nothing = torch.tensor([[1, 2], [3, 4]]), torch.zeros(2, 3, dtype=torch.bool)
    scores = score_completions(model, ids, torch.ones_like(ids), torch.zeros(2, 3, dtype=torch.long), nothing)
    assert scores.log_probs.tolist() == [[0.0] * 3] * 2


def test_values_are_those_of_the_prefix_before_each_token():
    model = ready(critic=True)
    values = score_completions(model, *batch()).values
    ids = torch.tensor([PROMPTS[1] + COMPLETIONS[1]])
    for step in range(4):
        state = model.base_model(ids[:, : 1 + step]).last_hidden_state[0, -1]
        assert_close(values[1, step], model.critic.value_head(state)[0], rtol=1e-4, atol=1e-4)


def test_parts_are_left_out_on_request():
    model = ready(critic=True)
    full = score_completions(model, *batch())
    bare = score_completions(model, *batch(), hidden_only=True, with_values=False)
    assert bare.log_probs is bare.entropy is bare.values is None
    assert bare.hidden.shape == (7, 16)
    assert full.hidden is None
    assert score_completions(model, *batch(), hidden_only=True).values is not None
    assert score_completions(ready(), *batch()).values is None


def test_other_calls_are_untouched():
    plain, model = tiny_model("llama"), ready(critic=True)
    ids = torch.tensor([[1, 2, 3]])
    assert_close(model(ids, labels=ids).loss, plain(ids, labels=ids).loss)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).tolist() == (
        plain.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    )


def test_twice_is_once_and_a_deep_copy_is_its_own():
    model = ready()
    forward = model.forward
    enable_completion_scoring(model)
    assert model.forward == forward
    copied = copy.deepcopy(model)
    expected = score_completions(copied, *batch()).log_probs
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(score_completions(copied, *batch()).log_probs, expected)


def test_an_adapter_counts():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    enable_completion_scoring(model)
    assert base_causal_lm(model)._scores_completions
    before = score_completions(model, *batch()).log_probs
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    after = score_completions(model, *batch()).log_probs
    assert (after - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert_close(score_completions(model, *batch()).log_probs, before)


def test_a_family_whose_logits_are_not_understood_is_refused():
    model = tiny_model("llama")

    class Shifted(torch.nn.Linear):
        """Another projection in the model's own forward than in `get_output_embeddings`."""

    shifted = Shifted(16, 18, bias=False)
    model.get_output_embeddings = lambda: shifted
    with pytest.raises(ValueError, match=r"`model` \(LlamaForCausalLM\) must compute its logits as softcap"):
        enable_completion_scoring(model)


def test_the_check_leaves_the_mode_alone():
    model = tiny_model("llama").train()
    enable_completion_scoring(model)
    assert model.training


def test_scatter_keeps_the_gradient():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    out = scatter(values, mask)
    assert out.tolist() == [[1.0, 0.0], [2.0, 3.0]]
    (out * torch.tensor([[1.0, 9.0], [3.0, 4.0]])).sum().backward()
    assert values.grad.tolist() == [1.0, 3.0, 4.0]


@pytest.mark.parametrize("family", PADDING_MATTERS)
def test_a_family_that_padding_changes_is_scored_in_plain_passes(family):
    model = ready(family)
    assert runs_plainly(model)
    scores = score_completions(model, *batch())
    scores.log_probs.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = score_completions(model, *batch(), hidden_only=True).hidden
    start = 0
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids, count = torch.tensor([prompt + completion]), len(completion)
        log_probs = type(model).forward(model, ids, use_cache=False).logits[0].log_softmax(-1)
        picked = log_probs[-count - 1 : -1][range(count), completion]
        assert_close(scores.log_probs[row, :count], picked, rtol=0, atol=1e-4)
        picked.sum().backward()
        trunk = model.base_model(ids).last_hidden_state[0, -count - 1 : -1]
        assert_close(hidden[start : start + count], trunk, rtol=1e-4, atol=1e-4)
        start += count
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_others_are_scored_in_one_pass(family):
    assert not runs_plainly(ready(family))


def test_an_adapter_is_checked_though_its_base_was_before():
    base = ready()
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert not runs_plainly(base)
    enable_completion_scoring(model)
    assert runs_plainly(model)


def test_a_cache_that_changes_the_model_is_noticed(monkeypatch):
    model = tiny_model("llama")
    original = type(model).prepare_inputs_for_generation

    def all_at_the_start(self, *args, **kwargs):
        inputs = original(self, *args, **kwargs)
        return inputs | {"position_ids": torch.zeros_like(inputs["input_ids"])}

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", all_at_the_start)
    enable_completion_scoring(model)
    assert runs_plainly(model)


def test_rows_that_change_each_other_are_refused():
    model = tiny_model("llama")

    def mixed(module, inputs, output):
        return output + 0.1 * (len(output) - 1) * output.mean(0, keepdim=True)

    model.model.norm.register_forward_hook(mixed)
    with pytest.raises(ValueError, match="must score a completion by itself"):
        enable_completion_scoring(model)


def test_a_model_that_is_refused_is_refused_again():
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda module, inputs, output: output + output.mean(1, keepdim=True))
    for _ in range(2):
        with pytest.raises(ValueError, match="must be a causal LM, but its log-prob of a token changes"):
            enable_completion_scoring(model)
