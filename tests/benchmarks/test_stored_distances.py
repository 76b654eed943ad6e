"""The benchmarks of stored draws, run small."""

import pytest

from rlhf_bayes.testing import EnumerableLM

from .scripts import load

pytestmark = pytest.mark.slow

# the benchmarks take them from their folder when they run as scripts
for name in ("equal_samples", "preference_files", "reward_methods", "real_reward", "cached_llama", "real_tasks"):
    load(name)
for name in ("posterior_distances", "real_posterior_worker", "real_report"):
    load(name)
distances, costs = load("stored_distances"), load("stored_draws")


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(distances, "EnumerableLM", lambda: EnumerableLM(vocab_size=4, max_completion_length=2))
    monkeypatch.setattr(distances, "quiet", lambda **options: None)  # for the tests that come after in this process
    return ["--output", str(tmp_path), "--samples", "64", "--loss", "js", "--learning-rates", "1e-3"]


def test_a_run_ends_in_a_table_and_goes_on_from_its_files(small, monkeypatch, capsys):
    distances.main([*small, "--seeds", "2", "--lag", "store", "1", "2"])
    table = capsys.readouterr().out
    assert table.count("js, 64, updates 1") == 3
    assert "2 seeds" in table
    assert " ± " in table
    monkeypatch.setattr(distances, "trained", None)  # it would be called
    distances.main([*small, "--seeds", "2", "--lag", "store", "1", "2"])
    assert capsys.readouterr().out == table


def test_other_seeds_give_the_verdict_than_choose_the_rate(small, monkeypatch, tmp_path):
    seen = []

    def measured(problem, cell, rate, seed, folder):
        seen.append((rate, seed))
        return {"reverse": [abs(rate - 2e-3) + seed / 1e6], "forward": [1.0]}

    monkeypatch.setattr(distances, "measured", measured)
    cell = distances.Cell("toy", "js", 64, 1, "store")
    found = distances.result_of(None, cell, (1e-3, 2e-3, 5e-3), 2, tmp_path)
    assert seen == [(1e-3, 1000), (2e-3, 1000), (5e-3, 1000), (2e-3, 0), (2e-3, 1)]
    assert found.rate == 2e-3
    assert found.reverse.mean == pytest.approx(0.5e-6)
    assert found.reverse.error == pytest.approx(0.5e-6)  # 1e-6 / √2 / √2


@pytest.mark.parametrize("arguments", [["--samples", "100"], ["--lag", "-1"], ["--task", "stories", "--shared", "no"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        distances.parse_args(arguments)
    assert arguments[0] in capsys.readouterr().err or "--shared" in arguments


def test_a_way_of_training_has_a_cost(tmp_path):
    costs.fill_store(str(tmp_path), hidden=64, layers=1)
    found = costs.cost_of("gdc, from a store", str(tmp_path), steps=2)
    assert found["peak_mb"] > found["model_mb"] > 0
    assert found["seconds"] > 0
