import json
import math

import pytest
import torch

from .scripts import load

pytestmark = pytest.mark.slow

load("equal_samples")  # which the benchmark takes from its folder when it runs as a script
load("exact_posterior")
robustness = load("gdc_robustness")


@pytest.fixture(scope="module")
def problem():
    return robustness.Problem(0.1)


def test_the_prior_meets_the_constraint_about_as_often_as_asked(problem):
    assert problem.log_z.exp().tolist() == pytest.approx([0.1] * 3, rel=0.25)
    allowed = problem.constraint(completion_ids=problem.toy.completion_ids)
    assert allowed == problem.allowed.tolist()


def test_the_prior_is_minus_log_z_from_the_posterior(problem):
    """KL(p‖π0) = −log Z for a condition."""
    run = robustness.Run()
    run.add(0, problem, problem.target.new_model())
    assert run.kl[0] == pytest.approx(-problem.log_z.mean().item(), abs=1e-4)
    assert run.satisfaction[0] == pytest.approx(problem.log_z.exp().mean().item(), abs=1e-4)


def test_exact_draws_by_rejection_agree_with_enumeration(problem, monkeypatch):
    monkeypatch.setattr(robustness, "DRAWS", 1000)
    policy = problem.target.new_model()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        exact = robustness.Run()
        exact.add(0, problem, policy)
    estimates = [draws.forward_kl(problem.language_model(policy)) for draws in problem.exact_draws(seed=0)]
    mean = sum(kl for kl, _ in estimates) / len(estimates)
    error = math.sqrt(sum(variance for _, variance in estimates)) / len(estimates)
    assert abs(mean - exact.kl[0]) < 5 * error


def test_satisfied_means_to_stay():
    run = robustness.Run(samples=[0, 64, 128, 192], kl=[1.0] * 4, satisfaction=[0.1, 0.95, 0.8, 0.92])
    assert run.samples_until_satisfied == 192
    assert not run.worse
    run.satisfaction[-1], run.kl[-1] = 0.3, math.nan
    assert run.samples_until_satisfied is None
    assert run.worse


def test_a_run_ends_in_tables_and_curves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(robustness, "quiet", lambda **options: None)  # for the tests that come after in this process
    monkeypatch.setattr(robustness, "DRAWS", 10)
    path = tmp_path / "runs.json"
    methods = ["--method", "{}", "--method", '{"divergence": "log_variance"}']
    robustness.main(["--quick", "--samples", "128", *methods, "--json", str(path)])
    assert "further from the posterior" in capsys.readouterr().out
    runs = json.loads(path.read_text())
    assert [run["samples"][-1] for run in runs] == [256, 256]  # --quick has its own
    assert all(run["kl"][0] == pytest.approx(-math.log(0.5), rel=0.2) for run in runs)
    assert all(run["standard_error"] > 0 for run in runs)


@pytest.mark.parametrize("arguments", [["--samples", "100"], ["--z", "0.95"]])
def test_bad_arguments_are_refused_before_any_run(arguments, capsys):
    with pytest.raises(SystemExit):
        robustness.parse_args(arguments)
    assert arguments[0] in capsys.readouterr().err
