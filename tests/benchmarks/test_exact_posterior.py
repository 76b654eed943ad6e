import json

import pytest
import torch

from .scripts import load

pytestmark = pytest.mark.slow

load("equal_samples")  # which the benchmark takes from its folder when it runs as a script
exact_posterior = load("exact_posterior")


@pytest.fixture(scope="module")
def target():
    return exact_posterior.Target((2,))


def test_distance_of_the_prior_is_log_z_less_its_expected_evidence(target):
    """KL(π0‖π*) = log Z − E_π0[r/β]."""
    prior = target.new_model()
    with torch.no_grad():
        log_prior = target.toy.log_probs(prior, target.prompts)[0]  # (N,)
        distance = target.kl(prior)
    evidence = target.toy.log_likelihood[2]  # (N,)
    log_z = (log_prior + evidence).logsumexp(0)
    torch.testing.assert_close(distance, log_z - (log_prior.exp() * evidence).sum())


@pytest.mark.parametrize(
    "method",
    [
        "ppo",
        'ppo:{"num_iterations": 2, "steps_per_generation": 2}',
        "rloo",
        "grpo",
        "gdc",
        'gdc:{"divergence": "log_variance", "num_iterations": 2, "replay_batches": 2}',
    ],
)
def test_every_method_draws_the_same_number_of_completions(method):
    curve = exact_posterior.run_cell(exact_posterior.Cell(method, 2e-3, seed=0, samples=2 * exact_posterior.BATCH))
    assert curve.samples == [0, 64, 128]
    assert curve.kl[0] == pytest.approx(1.792, abs=5e-4)
    assert curve.kl[-1] != curve.kl[0]
    # Pinsker: TV ≤ √(KL/2), either way round
    for kls in (curve.kl, curve.forward_kl):
        assert all(0 < tv <= (kl / 2) ** 0.5 for tv, kl in zip(curve.tv, kls, strict=True))


def test_exact_gradients_approach_the_posterior(monkeypatch):
    monkeypatch.setattr(exact_posterior, "EXACT_STEPS", 10)
    curve = exact_posterior.run_cell(exact_posterior.Cell(exact_posterior.EXACT, 5e-3, seed=0, samples=10))
    assert curve.kl[-1] < 0.5 * curve.kl[0]


def test_the_learning_rate_with_the_best_median_counts():
    ends = {1e-3: (0.5, 0.1, 0.6), 2e-3: (0.3, 0.2, 0.9)}
    results = {
        exact_posterior.Cell("ppo", rate, seed, 64): exact_posterior.Curve(
            [0, 64], [1.0, end], [1.0, 2 * end], [0.9, end / 2]
        )
        for rate, row in ends.items()
        for seed, end in enumerate(row)
    }
    summary = exact_posterior.Summary.of("ppo", results)
    assert (summary.learning_rate, summary.median) == (2e-3, 0.3)
    assert summary.by_learning_rate == {1e-3: 0.5, 2e-3: 0.3}
    assert summary.other_ends == [[0.6, 0.4, 1.8], [0.15, 0.1, 0.45]]


def test_a_run_ends_in_a_table_a_plot_and_curves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        exact_posterior, "quiet", lambda **options: None
    )  # for the tests that come after in this process
    monkeypatch.setattr(exact_posterior, "EXACT_STEPS", 2)
    image, curves = tmp_path / "curves.png", tmp_path / "curves.json"
    options = ["--samples", "64", "--seeds", "1", "--learning-rates", "2e-3", "--plot", str(image)]
    exact_posterior.main(["--method", "ppo", "--json", str(curves), *options])
    assert "exact gradient, 2 Adam steps" in capsys.readouterr().out
    assert image.read_bytes().startswith(b"\x89PNG")
    assert json.loads(curves.read_text())[0]["samples"] == [0, 64]


@pytest.mark.parametrize("arguments", [["--method", "dpo"], ["--samples", "100"]])
def test_bad_arguments_are_refused_before_any_run(arguments, capsys):
    with pytest.raises(SystemExit):
        exact_posterior.parse_args(arguments)
    assert arguments[0] in capsys.readouterr().err
