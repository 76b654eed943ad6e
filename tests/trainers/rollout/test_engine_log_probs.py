"""An engine draws with log-probs of its own: they are the proposal's, and a wrong one is corrected or refused."""

import logging
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes import PPOConfig
from rlhf_bayes.lm.engine import EngineError, check_room, engine_rows, mismatch
from rlhf_bayes.testing import EnumerableLM

from ..engines import drawn_by_engine
from ..training import config, gdc_config, logged, trainer, weights

WRONG = 1.5  # temperature of an engine that should have 1
MANY = {"per_device_train_batch_size": 1500, "num_generations": 500, "learning_rate": 0.0}


@pytest.fixture(scope="module")
def hot():
    """The toy at the temperature of the wrong engine, which gives the exact log q."""
    return EnumerableLM(vocab_size=4, max_completion_length=3, temperature=WRONG)


def of_kind(kind, folder, **changes):
    return config(folder, **changes) if kind == "ppo" else gdc_config(folder, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "gdc"])
def test_the_engines_log_probs_are_the_proposals(toy, hot, tmp_path, kind):
    trained = drawn_by_engine(trainer(toy, of_kind(kind, tmp_path, max_steps=2)), WRONG)
    trained.train()
    policy = toy.random_policy(noise=0.0)  # as it was at the first rollout
    log_policy, log_q = toy.log_probs(policy).detach(), hot.log_probs(policy).detach()
    rollout = trained.rollouts[0]
    assert rollout.drawn_from == "engine"
    rows = [
        (toy.prompts.index(toy.tokenizer.decode(p[m.bool()], skip_special_tokens=True)), toy.completion_ids.index(x))
        for p, m, x in zip(
            rollout.prompt_ids,
            rollout.prompt_mask,
            [i[k.bool()].tolist() for i, k in zip(rollout.completion_ids, rollout.completion_mask, strict=True)],
            strict=True,
        )
    ]
    at = tuple(torch.tensor(rows).T)
    assert_close(rollout.token_log_probs.sum(-1), log_policy[at], atol=1e-4, rtol=1e-4)
    assert_close(rollout.log_proposal, log_q[at], atol=1e-4, rtol=1e-4)
    name = {"ppo": "policy_weights", "gdc": "log_proposal"}[kind]
    expected = {"ppo": (log_policy - log_q)[at].exp(), "gdc": log_q[at]}[kind]
    assert_close(trained.batches[0][name], expected, atol=1e-4, rtol=1e-3)
    assert trained.vllm_generation.synced == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "gdc"])
def test_what_is_logged_is_of_the_policy(toy, hot, tmp_path, kind):
    """ELBO, log Z, KL and E[r] of the policy, though the means over what the engine draws are far from them."""
    prior, policy = toy.random_policy(noise=0.0), toy.random_policy(noise=0.05, seed=1)
    with torch.no_grad():
        log_prior, log_policy, log_q = toy.log_probs(prior), toy.log_probs(policy), hot.log_probs(policy)
    log_w = toy.log_likelihood + log_prior - log_policy
    log_zs = (log_policy + log_w).logsumexp(-1, keepdim=True)  # (P, 1)
    quantities = {
        "posterior/elbo": log_w,
        "posterior/log_z": log_zs + (log_w - log_zs).exp() - 1,  # log of a mean near 1, to first order
        "posterior/kl_to_prior": log_policy - log_prior,
        "engine/reward": toy.rewards,
    }
    trained = drawn_by_engine(trainer(toy, of_kind(kind, tmp_path, **MANY), policy, ref_model=prior), WRONG)
    trained.train()
    for name, f in quantities.items():
        truth, of_engine = ((log_p.exp() * f).sum(-1, keepdim=True) for log_p in (log_policy, log_q))
        # the standard error of importance sampling with these draws, by enumeration
        spread = (log_q.exp() * ((log_policy - log_q).exp() * (f - truth)).square()).sum(-1).mean().sqrt()
        error = (spread / MANY["per_device_train_batch_size"] ** 0.5).item()
        (found,) = logged(trained, name)
        assert abs(found - truth.mean().item()) < 4.5 * error, name
        assert abs(of_engine.mean().item() - truth.mean().item()) > 5 * error, name  # so the test can tell


@pytest.mark.slow
def test_the_mismatch_is_logged_and_named(toy, hot, tmp_path, caplog):
    policy = toy.random_policy(noise=0.0)
    log_policy, log_q = toy.log_probs(policy).detach(), hot.log_probs(policy).detach()
    trained = drawn_by_engine(trainer(toy, config(tmp_path, **MANY), policy), WRONG)
    with caplog.at_level(logging.WARNING):
        trained.train()
    kl = (log_q.exp() * (log_q - log_policy)).sum(-1).mean().item()
    ess = 1 / (log_q.exp() * (2 * (log_policy - log_q)).exp()).sum(-1).mean().item()
    assert logged(trained, "engine/mismatch") == [pytest.approx(kl, rel=0.1)]
    assert logged(trained, "engine/ess") == [pytest.approx(ess, rel=0.05)]
    assert ess < 0.9
    (said,) = [record.message for record in caplog.records if "draws from another distribution" in record.message]
    assert "Weights correct for it, but of 1500 completions" in said


@pytest.mark.slow
def test_an_engine_with_other_weights_is_refused(toy, tmp_path):
    other = toy.random_policy(noise=0.5, seed=8)
    args = config(tmp_path, max_engine_mismatch=0.3, max_steps=2)
    trained = drawn_by_engine(trainer(toy, args), model=other)
    with pytest.raises(EngineError, match=r"nats per sequence from it, more than `max_engine_mismatch` = 0.3"):
        trained.train()
    before = weights(toy.random_policy(noise=0.0))
    assert all(torch.equal(before[name], value) for name, value in weights(trained.model).items() if name in before)
    trained = drawn_by_engine(trainer(toy, config(tmp_path, max_engine_mismatch=None)), model=other)
    trained.train()
    assert logged(trained, "engine/mismatch")[0] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "gdc"])
def test_continuous_batching_returns_log_probs_too(toy, tmp_path, kind):
    cache = {"num_blocks": 64, "max_batch_tokens": 256}
    args = of_kind(
        kind,
        tmp_path,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=cache,
        temperature=2.0,
    )
    trained = trainer(EnumerableLM(vocab_size=4, max_completion_length=3, temperature=2.0), args)
    trained.train()
    rollout = trained.rollouts[0]
    assert rollout.drawn_from == "engine"
    assert_close(rollout.log_proposal, rollout.token_log_probs.sum(-1), atol=1e-4, rtol=0)
    assert not torch.equal(rollout.log_proposal, rollout.token_log_probs.sum(-1))
    assert logged(trained, "engine/mismatch")[0] < 1e-6
    assert "generate_batch" not in vars(trained.model)


def saving(toy, folder, spoil=None):
    args = gdc_config(folder, max_steps=4, replay_batches=4, save_strategy="steps", save_steps=100)
    return drawn_by_engine(trainer(toy, args), WRONG, spoil)


def without_one(call, ids, log_probs):
    return (ids[:-1], log_probs[:-1]) if call == 3 else (ids, log_probs)


def with_nan(call, ids, log_probs):
    return (ids, [[math.nan, *log_probs[0][1:]], *log_probs[1:]]) if call == 3 else (ids, log_probs)


def cut_short(call, ids, log_probs):
    row = next(row for row, own in enumerate(ids) if len(own) == 3)
    if call != 3:
        return ids, log_probs
    return [*ids[:row], ids[row][:1], *ids[row + 1 :]], [*log_probs[:row], log_probs[row][:1], *log_probs[row + 1 :]]


def dies(call, ids, log_probs):
    if call == 3:
        raise ConnectionResetError("EngineCore died")
    return ids, log_probs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_one, "vLLM must return a completion for each of 24 requests, got 23"),
        (with_nan, r"vLLM must return a log-prob for each token, got \[nan"),
        (cut_short, r"vLLM must draw up to an EOS or 3 tokens, but completion \d+ has 1 tokens without EOS"),
        (dies, "vLLM failed while it drew completions: ConnectionResetError: EngineCore died"),
    ],
)
def test_a_failing_engine_stops_the_run_where_it_can_go_on(toy, tmp_path, spoil, message):
    with pytest.raises(EngineError, match=message) as caught:
        saving(toy, tmp_path, spoil).train()
    assert "checkpoint-2`: go on from it" in "\n".join(caught.value.__notes__)


@pytest.mark.slow
def test_a_server_that_is_lost_stops_all_processes(toy, tmp_path):
    """The others wait for the answer of the process that asks: it is empty, and not a hang."""

    class Client:
        def generate(self, **request):
            raise ConnectionError("no route to the server")

    trained = saving(toy, tmp_path)
    trained.vllm_mode, trained.vllm_generation.vllm_client, answers = "server", Client(), []

    def generate(prompts, images, num_generations, profiler):
        answers.append(trained.vllm_generation.vllm_client.generate(prompts=prompts))
        return [], answers[-1]["completion_ids"], answers[-1]["logprobs"], None

    trained.vllm_generation.generate = generate
    with pytest.raises(EngineError, match="vLLM failed while it drew completions: ConnectionError: no route"):
        trained.train()
    assert [answer["completion_ids"] for answer in answers] == [[]]
    # in a process that only waits
    trained.vllm_generation.vllm_client = None
    trained.vllm_generation.generate = lambda **request: ([], [], None, None)
    with pytest.raises(EngineError, match="a completion for each of 24 requests, got 0"):
        trained.train()


@pytest.mark.slow
def test_a_run_whose_engine_died_goes_on_as_if_nothing_had_been(toy, tmp_path):
    whole = saving(toy, tmp_path / "whole")
    whole.train()
    with pytest.raises(EngineError):
        saving(toy, tmp_path / "run", dies).train()
    again = saving(toy, tmp_path / "run")
    again.train(resume_from_checkpoint="auto")
    assert again.vllm_generation.calls == 2  # what was drawn and scored before is not drawn again
    for name, weight in weights(whole.model).items():
        assert_close(weights(again.model)[name], weight, rtol=0, atol=0)


@pytest.mark.slow
def test_what_an_engine_draws_after_eos_is_cut(toy, tmp_path):
    def goes_on(call, ids, log_probs):
        more = [2] if call == 1 else []
        return [[*row, *more] for row in ids], [[*row, *([-1.0] * len(more))] for row in log_probs]

    def reward(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    trained = drawn_by_engine(trainer(toy, config(tmp_path), None, reward), spoil=goes_on)
    trained.max_completion_length = 4  # the engine draws up to 3 tokens, and goes on with one
    trained.train()
    rollout = trained.rollouts[0]
    ended = rollout.completion_ids.eq(toy.tokenizer.eos_token_id) & rollout.completion_mask.bool()
    assert ended.any()
    assert (ended.sum(-1) <= 1).all()
    for row in ended.any(-1).nonzero().flatten():
        assert rollout.completion_mask[row].sum() == ended[row].long().argmax() + 1


def test_an_engine_without_room_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`vllm_max_model_length` must be at least a prompt plus"):
        config(tmp_path, PPOConfig, use_vllm=True, vllm_max_model_length=3)
    with pytest.raises(ValueError, match=r"`vllm_max_model_length` must be at least .* 5 \+ 3 tokens, got 7"):
        check_room("`vllm_max_model_length`", [2, 5], 3, 7)
    check_room("`vllm_max_model_length`", [2, 5], 3, 8)


@pytest.mark.slow
def test_prompts_without_room_are_refused_before_anything_is_drawn(toy, tmp_path):
    trained = drawn_by_engine(trainer(toy, config(tmp_path)))
    trained.args.vllm_max_model_length = 4
    with pytest.raises(ValueError, match="completions would be cut"):
        trained.train()
    assert trained.vllm_generation.calls == 0


def test_rows_by_hand():
    rows = engine_rows("vLLM", [[1, 9, 4], [2, 3]], [[-1.0, -2.0, -3.0], [-0.5, 1e-6]], 2, [9], 2)
    assert rows.completion_ids == [[1, 9], [2, 3]]
    assert rows.token_log_probs == [[-1.0, -2.0], [-0.5, 1e-6]]
    with pytest.raises(EngineError, match=r"got \[-1.0, 0.5\]"):
        engine_rows("vLLM", [[1, 9]], [[-1.0, 0.5]], 1, [9], 2)


def test_mismatch_by_hand():
    log_w = torch.tensor([0.0, math.log(3.0)])
    found = mismatch(log_w, torch.zeros(2))
    assert found.kl.item() == pytest.approx((0 + 3 - 1 - math.log(3.0)) / 2)
    assert found.ess.item() == pytest.approx(16 / (2 * 10))
    far = mismatch(torch.full((4,), -18.0), torch.zeros(4))
    assert far.kl.item() == pytest.approx(17.0, rel=1e-6)
    assert far.ess.item() == pytest.approx(1.0)  # the KL tells, where all weights are wrong alike
