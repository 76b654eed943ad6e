"""Drawing by vLLM's interface: a stand-in for the engine that draws what a raw request asks for, and nothing else."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from scipy.stats import chi2
from torch.testing import assert_close

from rlhf_bayes.lm import LanguageModel, VLLMLanguageModel
from rlhf_bayes.lm.continuation import regrow
from rlhf_bayes.samplers import BestOfN, ImportanceSampler, MetropolisHastings, RejectionSampler
from rlhf_bayes.testing import toy_reward


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
    detokenize: bool


class Engine:
    """`vllm.LLM` as far as it is used."""

    def __init__(self, model, extra=()):
        self.model, self.extra, self.requests, self.calls = model, list(extra), [], 0

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls += 1
        self.requests += sampling_params
        outputs = []
        for prompt, request in zip(prompts, sampling_params, strict=True):
            generator, ids = torch.Generator().manual_seed(request.seed), []
            while len(ids) < request.max_tokens and not (ids and ids[-1] in request.stop_token_ids):
                logits = self.model(torch.tensor([prompt["prompt_token_ids"] + ids])).logits[0, -1]
                probs = (logits.float() / request.temperature).softmax(-1)
                ids.append(int(torch.multinomial(probs, 1, generator=generator)))
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids + self.extra))]))
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
    draws = [drawing(toy).sample(toy.prompts, 4, seeded(seed)).completion_ids for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    state = torch.get_rng_state()
    drawing(toy).sample(toy.prompts, 4, seeded())
    assert torch.equal(torch.get_rng_state(), state)


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


def test_bad_input(toy, monkeypatch):
    with pytest.raises(TypeError, match=r"`engine` must be a `vllm.LLM`, got str without `generate`"):
        VLLMLanguageModel(toy.model, "engine", toy.tokenizer)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'rlhf_bayes\[vllm\]'"):
        drawing(toy)
