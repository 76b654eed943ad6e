import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from rlhf_bayes.lm import LanguageModel

from .families import FAMILIES, tiny_model, tiny_tokenizer

EOS = 16


def plain_log_prob(model, prompt_ids, completion_ids):
    """By the model's own logits, one unpadded sequence."""
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    start = len(prompt_ids)
    return sum(log_probs[start + t - 1, token].item() for t, token in enumerate(completion_ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_prob_is_that_of_the_models_own_logits_under_padding(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    expected = [
        plain_log_prob(model, prompt, completion)
        for prompt, completion in [([0, 1, 2, 3, 4], [5, EOS]), ([7], [1, 2, 3, 4]), ([7, 8], [EOS])]
    ]
    lm = LanguageModel(model, tokenizer, max_completion_length=4)
    log_prob = lm.log_prob(["abcde", "h", "hi"], [[5, EOS], [1, 2, 3, 4], [EOS]])
    assert_close(log_prob, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert log_prob.std() > 0.1  # the rows differ, or nothing was tested


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_drawn_has_the_log_prob_that_is_reported(family):
    lm = LanguageModel(tiny_model(family), tiny_tokenizer(), max_completion_length=6, batch_size=5)
    draws = lm.sample(["abc", "h", "ppppppp"], n=4, generator=torch.Generator().manual_seed(1))
    assert len(draws) == 12
    assert draws.prompts == ["abc"] * 4 + ["h"] * 4 + ["ppppppp"] * 4
    assert_close(draws.log_prob, lm.log_prob(draws.prompts, draws.completion_ids))
    lm.batch_size = 1
    assert_close(draws.log_prob, lm.log_prob(draws.prompts, draws.completion_ids), rtol=1e-5, atol=1e-5)
    assert draws.mask.sum(-1).tolist() == [len(ids) for ids in draws.completion_ids]
    assert draws.ended.tolist() == [ids[-1] == EOS for ids in draws.completion_ids]
    assert {len(ids) for ids in draws.completion_ids} != {6}  # some end by themselves


def test_frequencies_are_the_probabilities():
    lm = LanguageModel(tiny_model("llama", spread=12.0), tiny_tokenizer(), max_completion_length=2, batch_size=2000)
    draws = lm.sample(["ab"], n=2000, generator=torch.Generator().manual_seed(0))
    counts: dict[tuple[int, ...], int] = {}
    for ids in draws.completion_ids:
        counts[tuple(ids)] = counts.get(tuple(ids), 0) + 1
    for ids, count in sorted(counts.items(), key=lambda item: -item[1])[:10]:
        p = lm.log_prob(["ab"], [list(ids)]).exp().item()
        se = math.sqrt(p * (1 - p) / 2000)
        assert abs(count / 2000 - p) < 4.5 * se, f"{ids}: {count / 2000} against {p}, se {se}"


def test_the_models_own_generation_config_does_not_leak():
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer()
    free = LanguageModel(model, tokenizer, 5).sample(["abc"], 8, torch.Generator().manual_seed(3))
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 3.0
    config = model.generation_config
    draws = LanguageModel(model, tokenizer, 5).sample(["abc"], 8, torch.Generator().manual_seed(3))
    assert draws.completion_ids == free.completion_ids
    assert len({tuple(ids) for ids in draws.completion_ids}) > 1
    assert model.generation_config is config


def test_a_generator_reproduces_the_draw_and_spares_the_global_state():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer(), 5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = [lm.sample(["abc"], 8, torch.Generator().manual_seed(seed)).completion_ids for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(before, torch.get_rng_state())


def test_eos_counts_also_when_it_is_the_padding_token():
    model = tiny_model("llama")
    padded = LanguageModel(model, tiny_tokenizer(pad_is_eos=True), 4)
    plain = LanguageModel(model, tiny_tokenizer(), 4)
    completions = [[5, EOS], [1, 2, 3, 4]]
    assert_close(padded.log_prob(["abc", "h"], completions), plain.log_prob(["abc", "h"], completions))
    draws = padded.sample(["abc"], 32, torch.Generator().manual_seed(0))
    assert draws.completion_ids == plain.sample(["abc"], 32, torch.Generator().manual_seed(0)).completion_ids
    assert any(ids[-1] == EOS for ids in draws.completion_ids)


def test_chat_prompts_go_through_the_template():
    lm = LanguageModel(tiny_model("qwen2"), tiny_tokenizer(chat=True), 3)
    chat = [{"role": "user", "content": "de"}]
    assert_close(lm.log_prob([chat], [[5, EOS]]), lm.log_prob(["adebc"], [[5, EOS]]))
    draws = lm.sample([chat, "abc"], 1, torch.Generator().manual_seed(0))
    assert draws.completions[0] == [{"role": "assistant", "content": draws.texts[0]}]
    assert draws.completions[1] == draws.texts[1]


def test_temperature_tempers_each_token():
    model = tiny_model("llama")
    ids = torch.tensor([[0, 1, 5, EOS]])
    log_probs = (model(ids).logits[0].float() / 2.5).log_softmax(-1)
    expected = log_probs[1, 5] + log_probs[2, EOS]
    lm = LanguageModel(model, tiny_tokenizer(), 4, temperature=2.5)
    assert_close(lm.log_prob(["ab"], [[5, EOS]])[0], expected.detach())


def test_peft_adapters_count_and_zero_init_changes_nothing():
    base = tiny_model("llama")
    args = (["abc", "h"], [[5, EOS], [1, 2, 3, 4]])
    before = LanguageModel(base, tiny_tokenizer(), 4).log_prob(*args)
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert_close(LanguageModel(adapted, tiny_tokenizer(), 4).log_prob(*args), before)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    after = LanguageModel(adapted, tiny_tokenizer(), 4).log_prob(*args)
    assert (after - before).abs().min() > 1e-3
    merged = LanguageModel(adapted.merge_and_unload(), tiny_tokenizer(), 4).log_prob(*args)
    assert_close(after, merged, rtol=1e-4, atol=1e-4)


def test_a_model_is_loaded_from_its_folder(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = LanguageModel(tmp_path, max_completion_length=4).log_prob(["abc"], [[5, EOS]])
    assert_close(loaded, LanguageModel(model, tiny_tokenizer(), 4).log_prob(["abc"], [[5, EOS]]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "is empty"),
        ([5, EOS, 6], "goes on after the EOS at position 1"),
        ([5, 6], "prefix, not a completion"),
        ([1, 2, 3, 4, 5], "more than `max_completion_length` = 4"),
    ],
)
def test_what_is_no_completion_is_refused(ids, message):
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer(), 4)
    with pytest.raises(ValueError, match=message):
        lm.log_prob(["abc"], [ids])


def test_prompts_that_do_not_fit_are_refused():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer(), 4)
    with pytest.raises(ValueError, match="context of 64 tokens: prompt 1 has 61"):
        lm.sample(["a", "a" * 61])
    with pytest.raises(ValueError, match="at least one token"):
        lm.sample([""])
    with pytest.raises(ValueError, match="non-empty list"):
        lm.sample("abc")


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an EOS token"):
        LanguageModel(tiny_model("llama"), tokenizer)


@pytest.mark.parametrize("argument", ["max_completion_length", "batch_size", "temperature"])
def test_numbers_out_of_range_are_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be"):
        LanguageModel(tiny_model("llama"), tiny_tokenizer(), **{argument: 0})
