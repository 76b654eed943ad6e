"""The generation loop: its densities against a teacher-forced pass, its draws against enumeration, reordering."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy.stats import chisquare
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.lm.decoding import CachedTrunk, Decoding, PrefixReader, cache_name, draw_tokens, generator_on, joined

from .families import FAMILIES, tiny_model, tiny_tokenizer

PROMPTS = ["a", "bcdefghijkl", "cd"]


def prior_of(toy, **options):
    return LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length, **options)


def decoded(lm, prompts, n, seed=0):
    """Completions, with the log-probs that they were drawn with."""
    decoding, generator = Decoding(lm, prompts, n), torch.Generator().manual_seed(seed)
    token_log_probs = torch.zeros(len(prompts) * n, lm.max_completion_length)
    while decoding.rows.numel():
        rows, step, log_probs = decoding.rows, decoding.length, decoding.log_probs
        tokens = draw_tokens(log_probs, generator)
        token_log_probs[rows, step] = log_probs.gather(1, tokens[:, None]).squeeze(1)
        decoding.append(tokens)
    return decoding.completions(token_log_probs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_log_probs_are_those_of_one_teacher_forced_pass(family, temperature):
    lm = LanguageModel(tiny_model(family), tiny_tokenizer(), max_completion_length=9, temperature=temperature)
    drawn = decoded(lm, PROMPTS, 8)
    assert len({len(ids) for ids in drawn.completion_ids}) > 2
    assert_close(drawn.log_prob, lm.log_prob(drawn.prompts, drawn.completion_ids), rtol=1e-4, atol=1e-4)
    assert drawn.ended.tolist() == [ids[-1] in lm.eos_token_ids for ids in drawn.completion_ids]
    assert drawn.texts == lm.tokenizer.batch_decode(drawn.completion_ids, skip_special_tokens=True)


def test_adapters_take_part():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    lm = LanguageModel(model, tiny_tokenizer(), max_completion_length=6)
    drawn = decoded(lm, PROMPTS, 4)
    expected = lm.log_prob(drawn.prompts, drawn.completion_ids)
    assert_close(drawn.log_prob, expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (lm.log_prob(drawn.prompts, drawn.completion_ids) - expected).abs().max() > 0.1


def test_draws_come_from_the_model(toy):
    n = 2000
    drawn = decoded(prior_of(toy), toy.prompts, n)
    index = {tuple(ids): column for column, ids in enumerate(toy.completion_ids)}
    for p in range(len(toy.prompts)):
        rows = drawn.completion_ids[p * n : (p + 1) * n]
        assert drawn.prompts[p * n] == toy.prompts[p]
        counts = torch.bincount(torch.tensor([index[tuple(ids)] for ids in rows]), minlength=len(index)).double()
        expected = toy.log_prior[p].double().softmax(0) * n
        rare = expected < 5
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        assert chisquare(counts, expected).pvalue > 1e-4


def test_rows_that_end_leave_the_forward_pass(toy):
    lm = prior_of(toy)
    drawn = decoded(lm, toy.prompts, 50)
    decoding = Decoding(lm, toy.prompts, 50)
    step = 0
    while decoding.rows.numel():
        alive = [row for row, ids in enumerate(drawn.completion_ids) if len(ids) > step]
        assert decoding.rows.tolist() == alive
        assert len(decoding.log_probs) == len(alive)
        finished = decoding.append(torch.tensor([drawn.completion_ids[row][step] for row in alive]))
        assert finished.tolist() == [len(drawn.completion_ids[row]) == step + 1 for row in alive]
        step += 1
    assert decoding.token_ids() == drawn.completion_ids
    prompt_tokens = sum(len(ids) for ids in lm.prompt_token_ids(toy.prompts))  # once each, not 50 times
    assert decoding.tokens_evaluated == prompt_tokens + sum(len(ids) - 1 for ids in drawn.completion_ids)


def test_reordered_rows_go_on_as_their_sources():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer(), max_completion_length=6)
    eos = lm.eos_token_ids[0]
    decoding = Decoding(lm, PROMPTS, 3)
    decoding.append(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    decoding.append(torch.tensor([4, eos, 6, 5, 4, 3, eos, eos, 2]))
    decoding.reorder(torch.tensor([2, 0, 1, 5, 5, 5, 8, 6, 8]))
    assert decoding.rows.tolist() == [0, 1, 3, 4, 5, 6, 8]
    expected = [[3, 6], [1, 4], [2, eos], [6, 3], [6, 3], [6, 3], [9, 2], [7, eos], [9, 2]]
    assert decoding.token_ids() == expected
    alive = decoding.rows
    tokens = [3, 1, 2, 7, 9, 4, 5]
    log_probs = decoding.log_probs[range(7), tokens]
    decoding.append(torch.tensor(tokens))
    for row, token, log_prob in zip(alive.tolist(), tokens, log_probs, strict=True):
        single = Decoding(lm, [PROMPTS[row // 3]])
        for own in expected[row]:
            single.append(torch.tensor([own]))
        assert_close(single.log_probs[0, token], log_prob, rtol=1e-4, atol=1e-4)
    # dropping every unfinished row is legal too
    decoding.reorder(torch.tensor([2, 2, 2, 3, 3, 3, 7, 7, 7]))
    assert decoding.rows.tolist() == [3, 4, 5]


@pytest.mark.parametrize("order_seed", [0, 1])
def test_a_reader_knows_every_prefix(toy, order_seed):
    lm = prior_of(toy)
    reader = PrefixReader(lm)
    generator = torch.Generator().manual_seed(order_seed)
    pairs = [(p, ids) for p in range(len(toy.prompts)) for ids in toy.completion_ids]
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]
    states = reader.read([toy.prompts[p] for p, _ in pairs], [ids for _, ids in pairs])
    column = {tuple(ids): i for i, ids in enumerate(toy.completion_ids)}
    expected = torch.stack([toy.log_prior[p, column[tuple(ids)]] for p, ids in pairs])
    assert_close(states.log_prob, expected, rtol=1e-4, atol=1e-4)


def test_a_reader_runs_a_token_a_step():
    lm = LanguageModel(tiny_model("gpt2"), tiny_tokenizer(), max_completion_length=9)
    reader, run = PrefixReader(lm), []
    prefixes, prompts = [[], [], []], list(PROMPTS)
    for step in range(5):
        hook = lm.model.transformer.wte.register_forward_hook(lambda module, args, out: run.append(args[0].numel()))
        states = reader.read(prompts, prefixes)
        hook.remove()
        longest = max(map(len, PROMPTS))
        assert run.pop() == len({*zip(prompts, map(tuple, prefixes), strict=True)}) * (1 if step else longest)
        assert run == []
        expected = [Decoding(lm, [prompt]) for prompt in prompts]
        for row, prefix in enumerate(prefixes):
            for token in prefix:
                expected[row].append(torch.tensor([token]))
        assert_close(reader.next_log_probs(states.hidden), torch.cat([d.log_probs for d in expected]))
        # rows move, double and leave
        prompts = [prompts[2], prompts[0], prompts[2], prompts[1]][: 4 - step % 2]
        prefixes = [[*prefixes[i], token] for i, token in zip([2, 0, 2, 1], [step, 3, step, 5], strict=True)]
        prefixes = prefixes[: len(prompts)]


def test_completions_are_joined(toy):
    lm = prior_of(toy)
    parts = [decoded(lm, [prompt], 5, seed=s) for s, prompt in enumerate(toy.prompts)]
    whole = joined(parts)
    assert whole.completion_ids == [ids for part in parts for ids in part.completion_ids]
    assert_close(whole.log_prob, torch.cat([part.log_prob for part in parts]))


def test_models_without_a_cache_are_refused():
    class NoCache:
        def __call__(self, input_ids, **kwargs):
            hidden = torch.zeros(*input_ids.shape, 4)
            return type("Out", (), {"past_key_values": None, "last_hidden_state": hidden})

    with pytest.raises(ValueError, match=r"on a cache whose rows can be chosen.*NoCache returns NoneType"):
        CachedTrunk(NoCache(), [[1, 2]], torch.device("cpu"))


STATES = {"vocab_size": 18, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 16}
ATTENTION = {
    "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SCAN = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
# convolutions, a linear attention, a state space, both in one layer, and states alone
HYBRID = {
    "lfm2": ATTENTION | {"layer_types": ["conv", "full_attention"]},
    "bamba": ATTENTION | SCAN | {"attn_layer_indices": [1]},
    "falcon_h1": ATTENTION | SCAN | {"mamba_n_heads": 4, "mamba_d_ssm": 32},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
}
WITHOUT_ROWS = {
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 64},
    "recurrent_gemma": {
        "intermediate_size": 64, "num_attention_heads": 4, "lru_width": 32, "block_types": ["recurrent", "attention"],
    },
    "minimax": ATTENTION | {
        "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "head_dim": 8, "block_size": 4,
    },
}  # fmt: skip


def tiny_recurrent(family, options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**STATES, **options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return model


@pytest.mark.parametrize("family", HYBRID)
def test_hybrid_and_recurrent_caches_follow_their_rows(family):
    lm = LanguageModel(tiny_recurrent(family, HYBRID[family]), tiny_tokenizer(), max_completion_length=6)
    decoding, generator = Decoding(lm, PROMPTS[:2], 3), torch.Generator().manual_seed(0)
    log_prob, order = torch.zeros(6), torch.tensor([2, 0, 0, 4, 4, 5])
    while decoding.rows.numel():
        log_probs = decoding.log_probs
        tokens = draw_tokens(log_probs, generator)
        log_prob[decoding.rows] += log_probs.gather(1, tokens[:, None]).squeeze(1)
        decoding.append(tokens)
        if decoding.length == 2:
            decoding.reorder(order)
            log_prob = log_prob[order]
    for row, ids in enumerate(decoding.token_ids()):
        prompt = lm.prompt_token_ids([decoding.prompts[row]])[0]
        with torch.no_grad():  # alone, without padding or cache
            logits = lm.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()
        assert_close(log_prob[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", WITHOUT_ROWS)
def test_a_cache_without_rows_is_refused_before_anything_is_drawn(family):
    model = tiny_recurrent(family, WITHOUT_ROWS[family])
    lm = SimpleNamespace(
        model=model, device=model.device, temperature=1.0, eos_token_ids=[16], max_completion_length=4,
        prompt_token_ids=lambda prompts: [[1, 2], [3]],
    )  # fmt: skip
    for start in (lambda: Decoding(lm, ["ab", "c"]), lambda: PrefixReader(lm)):
        with pytest.raises(ValueError, match=r"must say the same token by token.*Sample by importance, rejection"):
            start()


def test_a_trunk_is_found_where_the_base_model_is_the_model_itself():
    sizes = ATTENTION | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 32}
    model = tiny_recurrent("llama4_text", sizes | {"attention_chunk_size": 32})
    assert model.base_model is model
    lm = LanguageModel(model, tiny_tokenizer(), max_completion_length=4)
    ids = [[3, 16], [1, 2, 5, 7]]
    for prompt, completion, found in zip(["ab", "cde"], ids, lm.log_prob(["ab", "cde"], ids), strict=True):
        (tokens,) = lm.prompt_token_ids([prompt])
        with torch.no_grad():
            logits = model(torch.tensor([tokens + completion])).logits[0, len(tokens) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()
        assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_goes_by_the_name_that_transformers_gives_it(toy):
    class Older:
        def __call__(self, input_ids, past_key_values, **kwargs):
            outputs = toy.model.base_model(input_ids, **{cache_name(toy.model.base_model): past_key_values}, **kwargs)
            return SimpleNamespace(
                past_key_values=getattr(outputs, cache_name(toy.model.base_model)),
                last_hidden_state=outputs.last_hidden_state,
            )

    for trunk in (toy.model.base_model, Older()):
        cached = CachedTrunk(trunk, [[1, 2], [3]], torch.device("cpu"))
        cached.append(torch.tensor([2, 1]))
        for row, ids in enumerate(([1, 2, 2], [3, 1])):
            assert_close(cached.hidden[row], toy.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1])


def test_a_generator_stays_where_the_model_is():
    generator = torch.Generator().manual_seed(3)
    assert generator_on(torch.device("cpu"), generator) is generator
    assert generator_on(torch.device("cpu"), None) is None


@pytest.mark.parametrize("make", [lambda lm: Decoding(lm, ["ab"]), PrefixReader], ids=["Decoding", "PrefixReader"])
@pytest.mark.parametrize("family", ["rwkv", "llama with a prompt"])
def test_models_that_padding_or_a_cache_changes_are_refused(make, family):
    model = tiny_model(family.split()[0])
    if family != "rwkv":
        model = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    lm = LanguageModel(model, tiny_tokenizer(), max_completion_length=4)
    with pytest.raises(ValueError, match="must compute the same log-probs with padding and a cache as without"):
        make(lm)
