from argparse import Namespace

import pytest
import torch
from rich.console import Console

from rlhf_bayes.testing import EnumerableLM, toy_reward

from .scripts import load

pytestmark = pytest.mark.slow

# the benchmark takes them from its folder when it runs as a script
for name in ("equal_samples", "preference_files", "reward_methods", "real_reward", "cached_llama", "real_tasks"):
    load(name)
estimates, worker, floor = load("posterior_distances"), load("real_posterior_worker"), load("real_floor")


@pytest.fixture(scope="module")
def toy():
    return EnumerableLM(max_completion_length=2)


@pytest.fixture
def target(toy, tmp_path):
    folder = toy.save(tmp_path)
    task = load("real_tasks").Task("toy", folder, toy.prompts, toy_reward, toy.beta, length=2)
    prior = worker.cached(task, folder)
    return worker.Target(task, prior, estimates.Draws.of(prior, task, 512, seed=0), "")


def settings(**changed):
    usual = {"draws": 2048, "epochs": 1, "steps": 50, "rows": 32, "likelihood_rate": 3e-3, "policy_rate": 3e-3}
    return Namespace(**(usual | changed))


def test_each_stage_ends_near_the_posterior(toy, target):
    models = {}
    for name, model in floor.stages(target, settings(), Console(quiet=True)):
        with torch.no_grad():
            models[name] = toy.reverse_kl(model).mean().item(), toy.forward_kl(model).mean().item()
    (start, start_forward), (_, likelihood), (end, _) = models.values()
    assert start > 0.2
    assert likelihood < 0.1 * start_forward  # by exact enumeration, which neither stage uses
    assert end < 0.05 * start


def test_maximum_likelihood_has_the_gradient_of_enumeration(toy, target):
    # with one step and as many rows as can be, the direction of −∇KL(π*‖π)
    draws = estimates.Draws.of(target.prior, target.task, 4096, seed=3)
    model, exact = target.task.load_model(), toy.random_policy(noise=0.0)
    toy.forward_kl(exact).mean().backward()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rate = settings(rows=4096, likelihood_rate=1e-4)
    floor.maximum_likelihood(model, estimates.prompt_token_ids(target.task), draws, rate)
    step = torch.cat([(weight - before[name]).flatten() for name, weight in model.named_parameters()])
    gradient = torch.cat([weight.grad.flatten() for weight in exact.parameters()])
    largest = gradient.abs() > gradient.abs().quantile(0.9)
    assert (step[largest].sign() == -gradient[largest].sign()).float().mean() > 0.97  # Adam's first step is the sign


def test_the_script_prints_and_keeps_a_row_a_stage(target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(floor.Target, "of", lambda *args: target)
    (tmp_path / "models").mkdir()
    flags = ["--draws", "64", "--steps", "2", "--rows", "8", "--prior-draws", "512"]
    floor.main(["--shared", str(tmp_path), "--output", str(tmp_path / "out"), *flags])
    rows = (tmp_path / "out" / "floor_stories.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["stage", "the prior", "maximum likelihood", "then on-policy"]
    assert "draws that count" in capsys.readouterr().out


def test_too_few_rows_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        floor.parse_args(["--rows", "1"])
