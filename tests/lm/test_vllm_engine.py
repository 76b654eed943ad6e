"""`VLLMLanguageModel` on vLLM itself, which `make test-vllm` installs. A process can hold one engine: all share it."""

import copy
import math
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_bayes import GDCTrainer, toy
from rlhf_bayes.lm import LanguageModel, VLLMLanguageModel
from rlhf_bayes.lm.engine import EngineError
from rlhf_bayes.samplers import ImportanceSampler, MetropolisHastings, RejectionSampler, expectation
from rlhf_bayes.samplers.smc import RECORD as SMC_RECORD
from rlhf_bayes.store import Actor, CompletionStore
from rlhf_bayes.store.weights_folder import Wanted, WeightsFolder
from rlhf_bayes.toy.rewards import sentiment_reward

from ..trainers.training import gdc_config
from ..trainers.vllm_here import IN_FP32, prepare_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.processes, pytest.mark.slow]  # vLLM may start some
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it in an environment of its own")

PROMPT = "The movie"
CONTEXT = 64  # the model has 128
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def engine():
    prepare_vllm()
    from vllm import LLM

    return LLM(toy.model_path(), max_model_len=CONTEXT, logprobs_mode="processed_logprobs", **IN_FP32)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(toy.model_path(), dtype=torch.float32)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(toy.model_path())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fits(counts, probs):
    """p of the chi-square test of counts against probabilities; outcomes expected fewer than 5 times are one cell."""
    n = sum(counts.values())
    large = [outcome for outcome, p in probs.items() if n * p >= 5]
    observed = [counts[outcome] for outcome in large]
    expected = [n * probs[outcome] for outcome in large]
    return chisquare([*observed, n - sum(observed)], [*expected, n - sum(expected)]).pvalue


@torch.no_grad()
def next_token_probs(model, ids, temperature=1.0):
    logits = model(torch.tensor([ids])).logits[0, -1].double()
    return (logits / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_it_draws_what_transformers_scores(engine, model, tokenizer, temperature):
    """All completions of two tokens, by their probabilities from plain transformers."""
    lm = VLLMLanguageModel(model, engine, tokenizer, 2, temperature)
    drawn = lm.sample([PROMPT], 1500, seeded(1))
    assert_close(drawn.log_proposal, drawn.log_prob, atol=1e-4, rtol=0)
    prompt, eos = tokenizer(PROMPT)["input_ids"], tokenizer.eos_token_id
    probs = {}
    for first, p in enumerate(next_token_probs(model, prompt, temperature).tolist()):
        if first == eos or 1500 * p < 5:
            probs[(first,)] = p
            continue
        rest = next_token_probs(model, [*prompt, first], temperature).tolist()
        probs |= {(first, second): p * q for second, q in enumerate(rest)}
    assert sum(probs.values()) == pytest.approx(1.0, abs=1e-6)
    counts = Counter(tuple(ids) if tuple(ids) in probs else tuple(ids[:1]) for ids in drawn.completion_ids)
    assert fits(counts, probs) > 1e-3
    tempered = {outcome: p**1.3 for outcome, p in probs.items()}
    total = sum(tempered.values())
    assert fits(counts, {outcome: p / total for outcome, p in tempered.items()}) < 1e-6  # so the test can fail


def test_log_probs_of_long_completions_are_equal(engine, model, tokenizer):
    lm = VLLMLanguageModel(model, engine, tokenizer, 40, batch_size=16)
    drawn = lm.sample(toy.prompts()[:6], 8, seeded(2))
    assert int(drawn.ended.sum()) > 0
    assert_close(drawn.log_proposal, drawn.log_prob, atol=1e-3, rtol=0)
    plain = LanguageModel(model, tokenizer, 40)
    assert_close(drawn.log_prob, plain.log_prob(drawn.prompts, drawn.completion_ids), atol=1e-4, rtol=0)


def test_truncated_completions_are_whole_ones_of_full_length(engine, model, tokenizer):
    drawn = VLLMLanguageModel(model, engine, tokenizer, 5).sample(toy.prompts()[:4], 30, seeded(3))
    lengths = torch.tensor([len(ids) for ids in drawn.completion_ids])
    assert (~drawn.ended).any()
    assert (lengths[~drawn.ended] == 5).all()
    assert (lengths <= 5).all()


def test_seeds_reproduce_batches_do_not_matter_and_the_random_state_is_kept(engine, model, tokenizer):
    def ids(seed, batch_size):
        lm = VLLMLanguageModel(model, engine, tokenizer, 8, batch_size=batch_size)
        return lm.sample(toy.prompts()[:4], 6, seeded(seed)).completion_ids

    first = ids(1, 64)
    assert first == ids(1, 64) == ids(1, 5)
    assert first != ids(2, 64)
    torch.manual_seed(7)
    lm = VLLMLanguageModel(model, engine, tokenizer, 8, batch_size=5)
    several = lm.sample(toy.prompts()[:4], 6).completion_ids
    after = torch.rand(3)
    torch.manual_seed(7)
    whole = VLLMLanguageModel(model, engine, tokenizer, 8).sample(toy.prompts()[:4], 6).completion_ids
    assert several == whole
    assert torch.equal(after, torch.rand(3))


def test_several_tokens_end_a_completion(engine, model, tokenizer):
    (comma,) = tokenizer(",", add_special_tokens=False)["input_ids"][-1:]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, comma]
    lm = VLLMLanguageModel(model, engine, tokenizer, 24)
    drawn = lm.sample(toy.prompts()[:6], 20, seeded(4))
    last = Counter(ids[-1] for ids in drawn.completion_ids)
    assert last[comma] > 5
    assert last[tokenizer.eos_token_id] > 5
    assert all(comma not in ids[:-1] and tokenizer.eos_token_id not in ids[:-1] for ids in drawn.completion_ids)
    lm.log_prob(drawn.prompts, drawn.completion_ids)


def test_chats_are_prompts_as_transformers_makes_them(engine, model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if formal %} of{% endif %}"
    chat = [{"role": "user", "content": PROMPT}]
    lm = VLLMLanguageModel(model, engine, tokenizer, 2, chat_template_kwargs={"formal": True})
    drawn = lm.sample([chat], 600, seeded(5))
    assert_close(drawn.log_proposal, drawn.log_prob, atol=1e-4, rtol=0)
    ids = tokenizer(PROMPT + " of", add_special_tokens=False)["input_ids"]
    probs = dict(enumerate(next_token_probs(model, lm.prompt_token_ids([chat])[0]).tolist()))
    assert lm.prompt_token_ids([chat])[0][-len(ids) :] == ids
    assert fits(Counter(row[0] for row in drawn.completion_ids), probs) > 1e-3
    assert drawn.completions[0][0]["role"] == "assistant"


def test_an_engine_without_room_is_refused_before_it_draws(engine, model, tokenizer):
    lm = VLLMLanguageModel(model, engine, tokenizer, CONTEXT - 1)
    with pytest.raises(ValueError, match=r"The engine's `max_model_len` must be at least .*, got 64"):
        lm.sample([PROMPT], 2)


@pytest.fixture
def changing(engine, model, tokenizer):
    """The engine, which holds the base again when the test ends."""
    yield engine
    VLLMLanguageModel(AutoModelForCausalLM.from_pretrained(toy.model_path()), engine, tokenizer, 2).update_engine()


def moved(model, scale):
    """The policy of a LoRA adapter, away from the base that the engine holds."""
    policy = get_peft_model(copy.deepcopy(model), LORA)
    generator = seeded(6)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale, generator=generator)
    return policy


def test_the_base_under_a_policy_with_lora_is_refused(engine, model, tokenizer):
    lm = VLLMLanguageModel(moved(model, 1.0), engine, tokenizer, 24)
    with pytest.raises(EngineError, match=r"It must hold the model's weights: for a policy with LoRA"):
        lm.sample(toy.prompts()[:4], 8, seeded(7))


def test_the_base_under_a_policy_that_has_moved_a_little_is_corrected(engine, model, tokenizer):
    """E[length] of the policy, by weights π/q with draws of the base."""
    policy = moved(model, 0.1)
    lm = VLLMLanguageModel(policy, engine, tokenizer, 6)
    drawn = lm.sample([PROMPT], 600, seeded(8))
    weights = (drawn.log_prob - drawn.log_proposal).double().exp()
    assert weights.std() > 0.02
    assert abs(weights.mean() - 1) < 5 * weights.std() / 600**0.5


def test_samplers_draw_from_the_posterior_by_it(engine, model, tokenizer):
    """E[r] and log Z of the posterior agree with those from many draws of transformers."""
    plain = LanguageModel(model, tokenizer, 8, batch_size=512).tilt(
        sentiment_reward, 0.5, reward_clip_range=(-1.0, 1.0)
    )
    ours = VLLMLanguageModel(model, engine, tokenizer, 8).tilt(sentiment_reward, 0.5, reward_clip_range=(-1.0, 1.0))
    known = ImportanceSampler().sample(plain, [PROMPT], 4000, seeded(9))
    truth = expectation(known, sentiment_reward(known.completions))
    half = (known.log_z.high - known.log_z.low)[0].item() / 1.96 / 2
    samplers = {
        "importance": (ImportanceSampler(), 600),
        "rejection": (RejectionSampler(), 150),
        "metropolis_hastings": (MetropolisHastings(num_chains=20, burn_in=10), 200),
        "smc": (SMC_RECORD.make(ours, None, 200), 200),
    }
    for name, (sampler, n) in samplers.items():
        draws = sampler.sample(ours, [PROMPT], n, seeded(10))
        found = expectation(draws, sentiment_reward(draws.completions))
        error = math.hypot(found.standard_error.item(), truth.standard_error.item())
        assert abs(found.mean.item() - truth.mean.item()) < 4.5 * error, name
        if draws.log_z is not None:
            own = (draws.log_z.high - draws.log_z.low)[0].item() / 1.96 / 2
            assert abs((draws.log_z.log_z - known.log_z.log_z)[0].item()) < 4.5 * math.hypot(own, half), name
        if name == "rejection":
            assert draws.guarantee == "exact"


class Learner:
    """The learner's side of the folder between it and an actor."""

    def __init__(self, path):
        self.folder = WeightsFolder(path)
        self.folder.begin(Wanted("x", num_prompts=4, num_generations=8, max_unread=9))

    def push(self, step, policy):
        trained = {name: weight.data for name, weight in policy.named_parameters() if weight.requires_grad}
        config = policy.peft_config["default"] if hasattr(policy, "peft_config") else None
        self.folder.push(step, "x", trained, config)


@pytest.mark.parametrize("lora", [False, True])
def test_an_actor_draws_from_the_policy_that_was_pushed(changing, model, tokenizer, tmp_path, lora):
    """log q of each file is that of its policy, which plain transformers scores; and a training reads the store."""
    prior = VLLMLanguageModel(model, changing, tokenizer, 12)
    likelihood = prior.tilt(sentiment_reward, 0.5).likelihood
    learner = Learner(tmp_path / "weights")
    actor = Actor(tmp_path / "store", tmp_path / "weights", prior, likelihood, toy.prompts()[:8], seed=0)
    policies = [moved(model, 0.3 * step) for step in (1, 2)]
    if not lora:
        policies = [policy.merge_and_unload().requires_grad_(True) for policy in policies]
    for step, policy in enumerate(policies):
        learner.push(step, policy)
        assert actor.draw_once()
    store = CompletionStore(tmp_path / "store")
    plain = LanguageModel(model, tokenizer, 12)
    for name, policy in zip(store.files(), policies, strict=True):
        rows = store.rows_of(name)
        prompts, ids = [row["prompt"] for row in rows], [row["completion_ids"] for row in rows]
        log_q, log_prior = (torch.tensor([row[key] for row in rows]) for key in ("log_proposal", "log_prior"))
        assert_close(log_q, LanguageModel(policy, tokenizer, 12).log_prob(prompts, ids), atol=1e-4, rtol=0)
        assert_close(log_prior, plain.log_prob(prompts, ids), atol=1e-4, rtol=0)
        assert (log_q - log_prior).abs().max() > 0.1
    args = gdc_config(
        tmp_path, beta=0.5, divergence="log_variance", max_completion_length=12, num_generations=8,
        per_device_train_batch_size=32, max_steps=2, learning_rate=1e-3, actor_weights=str(tmp_path / "weights"),
    )  # fmt: skip
    trained = GDCTrainer(toy.model_path(), args=args, train_dataset=store)
    trained.train()
    assert trained.state.global_step == 2
    assert learner.folder.newest(trained.stored.run).step == 2
