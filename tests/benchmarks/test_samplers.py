import json
import math

import pytest
import torch

from rlhf_bayes.samplers import ImportanceSampler, RejectionSampler

from .scripts import load

pytestmark = pytest.mark.slow

load("sampler_tasks")  # the benchmark imports it from its own folder
samplers = load("samplers")


@pytest.fixture(scope="module")
def task():
    return samplers.toy_task()


def test_the_truth_is_that_of_the_toy(task, large_toy):
    weights = (large_toy.log_prior + large_toy.rewards / large_toy.beta).double()  # (P, N), log π0·exp(r/β)
    torch.testing.assert_close(task.log_z, weights.logsumexp(-1))
    torch.testing.assert_close(task.reward, (weights.softmax(-1) * large_toy.rewards).sum(-1))
    # clipping to its range leaves the reward alone, and gives rejection its bound
    evidence = task.posterior.log_likelihood(
        [task.prompts[1]] * len(large_toy.completion_ids), large_toy.completions, large_toy.completion_ids
    )
    torch.testing.assert_close(evidence, large_toy.log_likelihood[1])
    assert task.posterior.bound == pytest.approx(large_toy.log_likelihood.max().item(), abs=1e-5)


def test_tokens_are_positions_that_the_model_ran_on(task):
    prior = task.posterior.prior
    prompts = [prior.prompt_token_ids([prompt])[0] for prompt in task.prompts]
    ids = [[0, 1, prior.eos_token_ids[0]], [2, 3, 4, 5], [prior.eos_token_ids[0]]]
    with samplers.measured(prior) as cost:
        prior.log_prob(task.prompts, ids)
    longest = max(map(len, prompts))
    assert longest + 3 <= cost.tokens / 3 <= longest + 4  # padded on both sides; the last token need not be run
    with samplers.measured(prior):
        pass
    assert cost.tokens / 3 <= longest + 4  # not counted any more


def test_guard_and_pplm_are_compared(task):
    condition = samplers.condition_task()
    before, after = (condition.posterior.prior, condition.policy)
    prompts, ids = [condition.prompts[0]] * 2, [[2, 3, 4, 5], [5, 4, 3, 2]]
    assert (after.log_prob(prompts, ids) > before.log_prob(prompts, ids)).all()
    guard = samplers.measure(condition, "GUARD", samplers.methods_of(condition)["GUARD, from a policy"](64), 64, 2)
    assert guard.log_z_error < 4 * guard.log_z_error_bar
    pplm = samplers.measure(task, "PPLM", samplers.methods_of(task)["importance, PPLM"](64), 64, 1)
    assert pplm.reward_error < 6 * pplm.reward_error_bar


def test_errors_fall_as_their_bars_say(task):
    few, many = (samplers.measure(task, "importance", ImportanceSampler(), n, repetitions=4) for n in (64, 4096))
    assert many.tokens > 30 * few.tokens
    for name in ("reward_error", "log_z_error"):
        # 12 squares: their mean is off by a factor of at most 3 or so; bars of few draws are too short
        assert getattr(many, name) < 3**0.5 * getattr(many, f"{name}_bar")
        assert getattr(many, name) < getattr(few, name)


def test_the_bar_of_log_z_is_that_of_its_interval(task):
    draws = RejectionSampler().sample(task.posterior, task.prompts, 40, torch.Generator().manual_seed(0))
    bar = samplers.log_z_error_bar(draws)
    # 40 accepted: a relative standard error of about 1/√40 on Z
    assert bar.tolist() == pytest.approx([1 / math.sqrt(40)] * 3, rel=0.1)


def test_a_quick_run_ends_in_tables_a_plot_and_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(samplers, "quiet", lambda **options: None)  # for the tests that come after in this process
    image, figures = tmp_path / "samplers.png", tmp_path / "samplers.json"
    chosen = ["--method", "importance", "--method", "SMC, prefix reward", "--method", "best of 8"]
    samplers.main(["--quick", *chosen, "--plot", str(image), "--json", str(figures), "--max-completion-length", "8"])
    printed = capsys.readouterr().out
    assert "toy: 3 prompts" in printed
    assert "to `generate`" in printed
    assert image.read_bytes().startswith(b"\x89PNG")
    found = json.loads(figures.read_text())
    toy, model = (
        [(task, method) for method in ("importance", "best of 8", "SMC, prefix reward")] for task in ("toy", "model")
    )
    assert [(row["task"], row["method"]) for row in found["points"]] == [
        *toy,
        ("toy, a condition", "importance"),
        *model,
    ]
    assert all(row["log_z_error"] is None for row in found["points"] if row["method"] == "best of 8")
    assert [len(row) for row in (*found["decoding"].values(), *found["smc"].values())] == [1] * 5


@pytest.mark.parametrize("arguments", [["--sizes", "30"], ["--repetitions", "0"], ["--reference", "0"]])
def test_bad_arguments_are_refused_before_any_run(arguments, capsys):
    with pytest.raises(SystemExit):
        samplers.parse_args(arguments)
    assert arguments[0] in capsys.readouterr().err
