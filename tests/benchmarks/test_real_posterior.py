import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_bayes import toy as toy_data
from rlhf_bayes.rewards import load_reward
from rlhf_bayes.testing import EnumerableLM, toy_reward

from .scripts import load

pytestmark = pytest.mark.slow

# the benchmark takes them from its folder when it runs as a script
for name in ("equal_samples", "preference_files", "reward_methods"):
    load(name)
real_reward = load("real_reward")
fast, tasks = load("cached_llama"), load("real_tasks")
estimates, worker, report = load("posterior_distances"), load("real_posterior_worker"), load("real_report")
real_posterior = load("real_posterior")


@pytest.fixture(scope="module")
def toy():
    return EnumerableLM(max_completion_length=3)


@pytest.fixture(scope="module")
def task(toy, tmp_path_factory):
    folder = Path(toy.save(tmp_path_factory.mktemp("toy")))
    return tasks.Task("toy", folder, toy.prompts, toy_reward, toy.beta, length=toy.max_completion_length)


@pytest.fixture(scope="module")
def policy(toy):
    """Some exact gradient steps from the prior to the posterior."""
    model = toy.random_policy(noise=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        toy.reverse_kl(model).mean().backward()
        optimizer.step()
    return model


def cached(toy, model):
    return fast.CachedLlama(model, toy.tokenizer.eos_token_id, toy.max_completion_length)


def completion_table(toy):
    """All completions as ids and mask: (N, T) each."""
    ids = torch.zeros(len(toy.completion_ids), toy.max_completion_length, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, completion in enumerate(toy.completion_ids):
        ids[row, : len(completion)] = torch.tensor(completion)
        mask[row, : len(completion)] = True
    return ids, mask


def test_the_fast_model_scores_every_completion_as_enumeration_does(toy, task):
    model, (ids, mask) = cached(toy, toy.model), completion_table(toy)
    scores = [model.log_prob(prompt_ids, ids, mask) for prompt_ids in estimates.prompt_token_ids(task)]
    torch.testing.assert_close(torch.stack(scores).float(), toy.log_prior, atol=1e-5, rtol=0)


def test_the_fast_model_draws_from_the_distribution(toy, task):
    n, index = 4000, {tuple(ids): row for row, ids in enumerate(toy.completion_ids)}
    prompt_ids = estimates.prompt_token_ids(task)[1]
    drawn = cached(toy, toy.model).draw(prompt_ids, n, torch.Generator().manual_seed(0))
    rows = torch.tensor([index[tuple(ids)] for ids in drawn.token_ids()])  # all are completions of the toy
    torch.testing.assert_close(drawn.log_prob.float(), toy.log_prior[1, rows], atol=1e-5, rtol=0)
    p = toy.log_prior[1].double().exp()
    counts = torch.bincount(rows, minlength=len(p)).double()
    often = n * p > 20
    z = (counts - n * p)[often] / (n * p * (1 - p))[often].sqrt()
    assert often.sum() > 10
    assert z.abs().max() < 4.5


def test_the_fast_model_is_that_of_transformers():
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": 20, "max_position_embeddings": 16, "initializer_range": 0.5}
    torch.manual_seed(0)
    bitnet = BitNetForCausalLM(BitNetConfig(**small, hidden_act="silu")).eval()
    for name, weight in bitnet.named_parameters():
        if "norm" in name:  # weights of 1 would hide a norm that is left out or taken for another
            weight.data.uniform_(0.5, 1.5)
    fast.CachedLlama(bitnet, 1, 5).check([3, 4, 5])
    biased = LlamaForCausalLM(LlamaConfig(**small, attention_bias=True)).eval()
    biased.model.layers[0].self_attn.q_proj.bias.data += 1.0
    with pytest.raises(ValueError, match="must be computed as transformers computes it"):
        fast.CachedLlama(biased, 1, 5).check([3, 4, 5])
    with pytest.raises(ValueError, match="must be a Llama or BitNet"):
        fast.CachedLlama(EnumerableLM("gpt2").model, 1, 5)


def test_distances_are_those_of_enumeration(toy, task, policy):
    prior = cached(toy, toy.model)
    n = 8000
    draws = estimates.Draws.of(prior, task, n, seed=0)
    found = estimates.distances(cached(toy, policy), prior, task, draws, n=n, forward_draws=n, seed=1)
    reference = estimates.Reference.of(draws.log_likelihood)
    with torch.no_grad():
        log_posterior, log_policy = toy.log_posterior(), toy.log_probs(policy)
        exact_gap, exact_forward = toy.reverse_kl(policy).double(), toy.forward_kl(policy).double()
        posterior_kl = (log_posterior.exp() * (log_posterior - toy.log_prior)).sum(-1).double()
        prior_kl = (toy.log_prior.exp() * (toy.log_prior - log_posterior)).sum(-1).double()
        reward = (log_policy.exp() * toy.rewards).sum(-1).double()
    error = reference.variance.sqrt()
    assert ((reference.log_z - toy.log_z().double()).abs() < 5 * error).all()
    assert ((torch.tensor(found.gap) - exact_gap).abs() < 5 * torch.tensor(found.variance).sqrt()).all()
    # the spread of log-ratios over the square root of the draws that count
    loose = 5 * 2.0 / reference.ess.sqrt()
    assert ((torch.tensor(found.forward_kl) - exact_forward).abs() < loose).all()
    assert ((reference.kl_to_prior - posterior_kl).abs() < loose).all()
    assert ((reference.prior_kl - prior_kl).abs() < 5 * (2.0 / math.sqrt(n) + error)).all()
    assert ((torch.tensor(found.reward) - reward).abs() < 5 * toy.rewards.std() / math.sqrt(n)).all()
    assert exact_gap.min() > 0.15  # which the errors above would not reach


def test_the_control_variate_leaves_less_noise(toy, task, policy):
    prior = cached(toy, toy.model)
    drawn = estimates.Draws.of(cached(toy, policy), task, 2000, seed=1)
    log_weights = drawn.log_likelihood + drawn.under(prior, task) - drawn.log_prob
    gap, variance = estimates.reverse_kl(toy.log_z().double(), log_weights)
    assert variance.sum() < 0.8 * log_weights.var(-1).sum() / 2000
    with torch.no_grad():
        assert ((gap - toy.reverse_kl(policy).double()).abs() < 5 * variance.sqrt()).all()


def test_a_policy_that_has_left_the_posterior_has_a_large_gap():
    # all ratios π*/π of its draws are near 0: a coefficient of the control variate without a bound was 2e8
    log_z = torch.tensor([0.5, 1.0], dtype=torch.float64)
    log_weights = log_z[:, None] - torch.tensor([[25.0, 24.0, 27.0], [30.0, 28.0, 31.0]], dtype=torch.float64)
    gap, _ = estimates.reverse_kl(log_z, log_weights)
    assert gap.tolist() == pytest.approx([76 / 3, 89 / 3], abs=1.001)


def test_log_z_of_a_batch_has_the_expectation_of_enumeration(task):
    toy = EnumerableLM(max_completion_length=2)
    log_prior, evidence = toy.log_prior[2].double(), toy.log_likelihood[2].double()  # (N,)
    pairs = torch.logaddexp(evidence[:, None], evidence) - math.log(2)  # (N, N)
    exact = (log_prior[:, None] + log_prior).exp().mul(pairs).sum()
    mean = (log_prior.exp() * evidence).sum()
    rows = torch.multinomial(log_prior.exp(), 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    plain, corrected = (x.item() for x in estimates.batch_log_z(evidence[rows][None], 2))
    error = 5 * evidence[rows].std() / math.sqrt(20_000)
    assert abs(plain - exact) < error
    assert abs(corrected - (2 * exact - mean)) < 2 * error
    assert abs(toy.log_z()[2] - exact) > 2 * error  # so there is a bias to see


def test_a_reward_model_of_preferences_and_a_soft_condition_are_the_evidence(preferences, tmp_path, monkeypatch):
    monkeypatch.setattr(real_reward, "MAX_LENGTH", 64)
    monkeypatch.setattr(real_reward, "NORMALIZE_SAMPLES", 16)
    base, prompts = Path(toy_data.model_path()), ["The film was", "The hotel was"]
    folder = real_reward.trained_reward(tmp_path / "reward", base, preferences, prompts, length=8)
    completions = ["good", "very good, said the Fox", "bad for catfish", "two cats."]
    likelihood = real_reward.evidence(folder)
    found = likelihood.log_likelihood(["The film was"] * 4, completions, [[1]] * 4).tolist()
    rewards = load_reward(folder)(prompts=["The film was"] * 4, completions=completions)
    assert real_reward.names_an_animal(completions) == [0, 1, 0, 1]
    nats = [reward / 0.8 + 1.5 * animal for reward, animal in zip(rewards, (0, 1, 0, 1), strict=True)]
    assert found == pytest.approx(nats, rel=1e-5)
    reward = real_reward.as_reward(likelihood, beta=0.25)
    assert reward(["The film was"] * 4, completions, [[1]] * 4) == pytest.approx([0.25 * x for x in nats], rel=1e-5)
    assert real_reward.trained_reward(folder, base / "nowhere", preferences, prompts, 8) == folder  # not trained twice


def test_the_set_of_rates_grows_until_the_best_is_inside():
    assert real_posterior.extended({1e-5: 0.3, 2e-5: 0.2, 5e-5: 0.4}) is None
    assert real_posterior.extended({1e-5: 0.3, 2e-5: 0.2, 5e-5: 0.1}) == 1e-4
    assert real_posterior.extended({2e-5: 0.1, 5e-5: 0.2}) == 1e-5
    assert real_posterior.extended({1e-6: 0.1}) is None


def fake_result(run, gap):
    return {"distances": {"gap": [gap, gap + 0.2]}}


def test_other_seeds_and_draws_choose_the_rate_than_give_the_verdict():
    args = argparse.Namespace(
        tasks=["toy"], methods={"a": worker.Method("ppo")}, seeds=2, choice_seed=1000, sizes=worker.Sizes(),
        learning_rates=None,
    )  # fmt: skip
    results, gaps = {}, {2e-5: 0.3, 5e-5: 0.2, 1e-4: 0.1, 2e-4: 0.15}
    tried = []
    while not (needed := real_posterior.still_needed(args, results))[0].for_verdict:
        tried.append(sorted(run.learning_rate for run in needed))
        results |= {run: fake_result(run, gaps[run.learning_rate]) for run in needed}
        assert {run.seed for run in needed} == {1000}
    assert tried == [[2e-5, 5e-5, 1e-4], [2e-4]]
    assert [(run.learning_rate, run.seed) for run in needed] == [(1e-4, 0), (1e-4, 1)]
    results |= {run: fake_result(run, 0.5) for run in needed}
    assert real_posterior.still_needed(args, results) == []
    assert report.choices_of(results, "toy", "a")[1e-4] == pytest.approx(0.2)


def test_models_of_smaller_weights_have_smaller_rates():
    given, tuned = argparse.Namespace(learning_rates=None), worker.Method("ppo")
    assert real_posterior.rates_of(given, "stories", tuned) == [2e-5, 5e-5, 1e-4]
    assert real_posterior.rates_of(given, "bitstories", tuned) == [2e-7, 5e-7, 1e-6]
    assert real_posterior.rates_of(given, "bitstories", worker.Method("ppo", learning_rates=(1e-6,))) == [1e-6]
    given.learning_rates = [1e-3, 2e-3]  # which the parser has put into the methods
    own = worker.Method("ppo", learning_rates=(1e-3, 2e-3))
    assert real_posterior.rates_of(given, "bitstories", own) == [1e-3, 2e-3]


def test_errors_are_clustered_by_prompt_and_seeds_add_theirs():
    table = torch.tensor([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]])
    found = report.averaged(table)
    by_prompt, by_seed = 2 / math.sqrt(3), math.sqrt(0.5) / math.sqrt(2)
    assert (found.mean, found.error) == (pytest.approx(3.5), pytest.approx(math.hypot(by_prompt, by_seed)))
    assert report.averaged(table[:1]).error == pytest.approx(by_prompt)


def test_a_run_ends_in_a_table_and_goes_on_from_its_files(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        real_posterior, "quiet", lambda **options: None
    )  # for the tests that come after in this process
    for module in (real_posterior, worker):
        monkeypatch.setattr(module, "TASKS", {"toy": lambda folders: task})
    (tmp_path / "models").mkdir()
    output = tmp_path / "out"
    arguments = ["--shared", str(tmp_path), "--output", str(output), "--samples", "64", "--seeds", "2"]
    arguments += ["--prior-draws", "300", "--method", "RLOO", "--method", 'ppo:{"num_generations": 2}']
    real_posterior.main([*arguments, "--learning-rates", "1e-3"])
    text = (output / "real_posterior.md").read_text()
    assert text in capsys.readouterr().out
    assert '| ppo:{"num_generations": 2} | 0.001 | ' in text
    assert (output / "real_posterior.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((output / "real_posterior.json").read_text())
    assert [(row["name"], row["seed"]) for row in rows][:2] == [("RLOO", 0), ("RLOO", 1)]
    assert rows[0]["distances"]["gap"] != rows[1]["distances"]["gap"]
    assert rows[2]["logged"]["posterior/gap"] >= 0

    monkeypatch.setattr(worker, "train", None)  # it would be called
    real_posterior.main([*arguments, "--learning-rates", "1e-3"])
    assert (output / "real_posterior.md").read_text() == text


def test_an_adapter_is_measured_as_a_part_of_the_policy(task, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "TASKS", {"toy": lambda folders: task})
    folders, sizes = tasks.Folders(tmp_path, tmp_path), worker.Sizes(samples=64, prior=64, verdict=64)
    whole, adapter = (
        worker.Run("toy", "a", worker.Method("ppo", lora=lora), 0.05, 0, sizes, for_verdict=True)
        for lora in (False, True)
    )
    assert whole.path(tmp_path, "") != adapter.path(tmp_path, "")
    distances = worker.measure(adapter, folders)["distances"]
    assert min(map(abs, distances["kl_to_prior"])) > 0.01  # one step at this rate, none without the adapter


@pytest.mark.parametrize(
    "arguments", [["--method", "dpo"], ["--samples", "100"], ["--shared", "nowhere"], ["--seeds", "0"]]
)
def test_bad_arguments_are_refused_before_any_run(arguments, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    with pytest.raises(SystemExit):
        real_posterior.parse_args(["--shared", str(tmp_path), *arguments])
    assert arguments[0] in capsys.readouterr().err
