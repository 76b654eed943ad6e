"""Scores without padding are those of padded batches, and a model of which this is not true is refused."""

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

from rlhf_bayes.lm import Critic, LanguageModel, enable_completion_scoring, score_completions
from rlhf_bayes.lm.critic import CRITIC, set_trainable
from rlhf_bayes.lm.forward import packs_rows
from rlhf_bayes.lm.padding_free import enable_packing

from .families import ALL, tiny_model, tiny_tokenizer
from .test_forward import padded

PROMPTS = [[1, 2, 3], [4], [5, 6], [1, 3, 5, 7, 9], [2], [7, 7]]
COMPLETIONS = [[7, 8], [9, 10, 11, 12, 1, 2, 3, 4, 5, 6, 7, 16], [13, 3, 3, 16], [2], [4, 16], [1, 2, 3]]
NOT_PACKED = {  # what their packed scores miss, by the message
    "rwkv": "it is run in plain passes",
    "bart": "it is run in plain passes",
    "mamba": "the log-probs of a completion change by .* nats a token beside others in a row",
    "lfm2": "the log-probs of a completion change by",
    "opt": "the log-probs of a completion change by",
    "bloom": "the log-probs of a completion change by",
}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def batch(value=0):
    return (*padded(PROMPTS, left=True, value=value), *padded(COMPLETIONS, left=False, value=value))


def with_critic(model, critic):
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    lm.add_module(CRITIC, critic)
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    set_trainable(lm, critic)
    return model


def lora_with_an_adapter_for_the_critic():
    model = get_peft_model(tiny_model("llama"), LORA)
    model.add_adapter(CRITIC, LORA)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=generator)
    return with_critic(model, Critic(16, adapter=CRITIC))


MODELS = {
    "gpt2": lambda: tiny_model("gpt2"),
    "gemma2": lambda: tiny_model("gemma2"),
    "qwen3_moe": lambda: tiny_model("qwen3_moe"),
    "shared critic": lambda: with_critic(tiny_model("llama"), Critic(16)),
    "critic of its own": lambda: with_critic(
        tiny_model("llama"), Critic(16, backbone=tiny_model("qwen2", seed=3).base_model)
    ),
    "critic on an adapter": lora_with_an_adapter_for_the_critic,
}


def scores_and_gradients(model, checkpointing=False):
    model.train(checkpointing)  # checkpoints are made in training mode only
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    scores = score_completions(model, *batch(), temperature=1.3, with_hidden=True)
    loss = (scores.log_probs * torch.arange(1.0, 13.0)).sum() + scores.entropy.sum() + scores.hidden.square().sum()
    loss = loss if scores.values is None else loss + scores.values.square().sum()
    model.zero_grad()
    loss.backward()
    return scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, checkpointing=False):
    """Padded, then packed: the same scores and gradients from fewer tokens."""
    sizes = []
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    enable_completion_scoring(model)
    expected, gradients = scores_and_gradients(model)
    enable_packing(model)
    lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scores, ours = scores_and_gradients(model, checkpointing)
    for name, column, other in zip(scores._fields, scores, expected, strict=True):
        assert (column is None) == (other is None)
        if column is not None:
            assert_close(column, other, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        size = gradient.abs().max().item()
        assert_close(ours[name], gradient, rtol=0, atol=1e-5 * max(1.0, size), msg=lambda m, n=name: f"{n}: {m}")
    return sizes


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_are_those_of_a_padded_batch(name):
    sizes = check_equal(MODELS[name]())
    # 6 rows of 5 + 12 columns hold 38 tokens: 13 of the longest sequence, and 25 in two rows
    assert set(sizes) == {torch.Size([3, 13])}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention(attention):
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    check_equal(model)


@pytest.mark.parametrize("name", ["gemma2", "critic on an adapter"])
def test_with_gradient_checkpointing(name):
    check_equal(MODELS[name](), checkpointing=True)


def test_what_stands_in_the_padding_does_not_matter():
    model = tiny_model("llama")
    enable_completion_scoring(model)
    enable_packing(model)
    first, second = (score_completions(model, *batch(value)) for value in (0, 16))
    assert torch.equal(first.log_probs, second.log_probs)
    assert (first.log_probs[~batch()[3]] == 0).all()


def test_rows_without_completions_are_scored():
    model = tiny_model("llama")
    enable_completion_scoring(model)
    enable_packing(model)
    ids, nothing = torch.tensor([[1, 2], [3, 4]]), torch.zeros(2, 3, dtype=torch.bool)
    scores = score_completions(model, ids, torch.ones_like(ids), torch.zeros(2, 3, dtype=torch.long), nothing)
    assert scores.log_probs.tolist() == [[0.0] * 3] * 2


@pytest.fixture
def flash_in_torch(monkeypatch):
    """The name of an attention that goes all the way of transformers' flash attention, up to its kernel."""
    seen = []

    def kernel(q, k, v, softmax_scale=None, causal=True):
        mask = torch.ones(q.size(1), k.size(1), dtype=torch.bool).tril(k.size(1) - q.size(1))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first, mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    def kernel_of_several(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        lengths, of_keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (int(max_seqlen_q), int(max_seqlen_k)) == (max(lengths), max(of_keys))
        seen.append(lengths)
        parts = zip(q.split(lengths), k.split(of_keys), v.split(of_keys), strict=True)
        return torch.cat([kernel(*(x[None] for x in part), **options)[0] for part in parts])

    kernels = kernel, kernel_of_several, None, flash._pad_input, flash._unpad_input
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: kernels)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    AttentionInterface.register("flash_in_torch", flash_attention_forward)
    AttentionMaskInterface.register("flash_in_torch", flash_attention_mask)
    yield seen
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("flash_in_torch")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_flash_attention_is_given_one_row_and_the_length_of_each_sequence(flash_in_torch, family):
    model, plain = tiny_model(family), tiny_model(family)
    model.config._attn_implementation = "flash_in_torch"
    for each in (model, plain):
        enable_completion_scoring(each)
    enable_packing(model)
    flash_in_torch.clear()
    scores, gradients = scores_and_gradients(model)
    assert flash_in_torch == [[13, 6, 6, 5, 5, 3]] * 2  # in each layer
    expected, theirs = scores_and_gradients(plain)
    assert_close(scores.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    assert_close(scores.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
    for name, gradient in theirs.items():
        assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize("family", ALL)
def test_each_family_is_packed_or_refused(family):
    model = tiny_model(family)
    enable_completion_scoring(model)
    expected = score_completions(model, *batch()).log_probs
    if family in NOT_PACKED:
        name = type(model).__name__
        with pytest.raises(
            ValueError, match=f"`padding_free` must be False for {name}, got True: .*{NOT_PACKED[family]}"
        ):
            enable_packing(model)
        assert not packs_rows(model)
    else:
        enable_packing(model)
        assert packs_rows(model)
    assert_close(score_completions(model, *batch()).log_probs, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_run_without_a_mask_is_refused():
    model = tiny_model("llama")
    enable_completion_scoring(model)
    trunk = model.model.forward

    def needs_a_mask(*args, **kwargs):
        kwargs["attention_mask"].sum()
        return trunk(*args, **kwargs)

    model.model.forward = needs_a_mask
    with pytest.raises(
        ValueError, match="`padding_free` must be False for LlamaForCausalLM, got True: it stops: KeyErr"
    ):
        enable_packing(model)
    assert not packs_rows(model)


def test_prompts_of_virtual_tokens_are_refused():
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    enable_completion_scoring(model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM with a PROMPT_TUNING adapter, got True: .* plain passes"):
        enable_packing(model)


def test_weights_that_zero_3_shards_are_refused():
    model = tiny_model("llama")
    enable_completion_scoring(model)
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 shards its weights"):
        enable_packing(model)


def test_inputs_of_images_are_refused():
    model = tiny_model("llama")
    enable_completion_scoring(model)
    enable_packing(model)
    with pytest.raises(ValueError, match=r"`model_inputs` must be None for LlamaForCausalLM, .* `padding_free` out"):
        score_completions(model, *batch(), model_inputs=[{}] * len(PROMPTS))


def test_a_language_model_of_a_packed_policy_scores_as_before():
    model = tiny_model("llama")
    lm = LanguageModel(model, tiny_tokenizer(), max_completion_length=6)
    prompts, completions = ["abc", "d", "efghij"], [[7, 8, 16], [9, 10, 11, 12, 2, 16], [13, 16]]
    expected = lm.log_prob(prompts, completions)
    enable_packing(model)
    assert_close(lm.log_prob(prompts, completions), expected, rtol=1e-5, atol=1e-5)
