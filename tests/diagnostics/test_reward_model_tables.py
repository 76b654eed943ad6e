"""Tables and plots of reward models: what is drawn, read back from the figure."""

import io

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from rlhf_bayes.diagnostics import plot_overoptimization, plot_reliability, preference_table
from rlhf_bayes.numerics.bradley_terry import preference_metrics
from rlhf_bayes.numerics.calibration import reliability_bins

METRICS = {"accuracy": 0.78125, "log_loss": 0.47, "brier": 0.15, "ece": 0.031}


def rendered(table) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue()


def cells(table) -> dict[str, list[str]]:
    return {str(column.header): list(column.cells) for column in table.columns}


@pytest.fixture
def figure(monkeypatch):
    """The figure that is saved next."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return lambda: saved[-1]


@pytest.fixture(scope="module")
def bins():
    prob = torch.tensor([0.55, 0.45, 0.72, 0.73, 0.95, 0.04])
    target = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    return reliability_bins(prob, target, num_bins=5)


def test_table_has_a_row_a_model_and_the_columns_that_any_has():
    table = preference_table({"single": METRICS, "pair": {**METRICS, "disagreement_vote": 0.125, "accuracy": 0.5}})
    columns = cells(table)
    assert columns[""] == ["single", "pair"]
    assert columns["accuracy"] == ["0.781", "0.500"]
    assert columns["log\nloss\n(nats)"] == ["0.470", "0.470"]
    assert columns["split"] == ["–", "0.12"]
    assert "votes\nright" not in columns
    assert table.caption is None
    both = preference_table({"a": {**METRICS, "accuracy_low": 0.71, "accuracy_high": 0.84}, "b": METRICS})
    assert both.caption == "Accuracy, 95% interval over pairs: a 0.710 to 0.840."


def test_table_takes_what_evaluation_gives():
    ours = preference_table({"a": METRICS})
    trainers = preference_table({"a": {f"eval_{name}": value for name, value in METRICS.items()} | {"eval_loss": 3.0}})
    assert rendered(ours) == rendered(trainers)


def test_table_holds_what_preference_metrics_gives_in_80_columns():
    generator = torch.Generator().manual_seed(0)
    votes = torch.tensor([[3, 0, 0], [2, 1, 0], [1, 1, 1], [0, 2, 1], [3, 0, 1]])
    metrics = preference_metrics(*torch.randn(2, 3, 5, generator=generator), votes=votes)
    text = rendered(preference_table({"LoRA, K = 4": metrics}))
    assert "…" not in text
    assert "LoRA, K = 4" in text
    for name in ("accuracy", "log_loss", "log_loss_member", "brier", "ece", "vote_accuracy", "vote_ceiling"):
        assert f"{metrics[name]:.3f}" in text, name
    for name in ("disagreement", "disagreement_vote"):
        assert f"{metrics[name]:.2f}" in text, name


def test_table_without_metrics_is_refused():
    with pytest.raises(ValueError, match=r"`metrics\['a'\]` must hold metrics of preferences .* got \['loss'\]"):
        preference_table({"a": {"loss": 1.0}})


def test_reliability_plot_draws_the_bins(bins, figure, tmp_path):
    plot_reliability(bins, tmp_path / "plot.png", num_pairs=6)
    assert imread(tmp_path / "plot.png").std() > 0.01
    axes, counts = figure().axes
    diagonal, points = axes.lines[0].get_xydata(), axes.lines[1].get_xydata()
    assert (diagonal[:, 0] == diagonal[:, 1]).all()
    # .55 and .45: confidence .55, one right of two; .72 and .73 too; .95 and .96 both right
    assert points.ravel().tolist() == pytest.approx([0.55, 0.5, 0.725, 0.5, 0.955, 1.0])
    assert [bar.get_height() for bar in counts.patches] == pytest.approx([2, 0, 2, 0, 2])
    assert all(bar.get_x() >= 0.5 and bar.get_x() + bar.get_width() <= 1 for bar in counts.patches)
    # two standard errors of one of two: 2·√(½·½/2)
    (segments, *_) = [container.lines[2][0].get_segments() for container in axes.containers]
    assert segments[0][1][1] - 0.5 == pytest.approx(0.5**0.5)


def test_reliability_plot_of_several_models(bins, figure, tmp_path):
    plot_reliability({"single": bins, "ensemble": bins}, tmp_path / "plot.png")
    axes, counts = figure().axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["calibrated", "single", "ensemble"]
    assert sum(bar.get_height() for bar in counts.patches) == pytest.approx(2.0)  # shares
    assert axes.lines[1].get_color() != axes.lines[2].get_color()


def test_over_optimisation_plot_has_one_colour_a_model(figure, tmp_path):
    runs = {
        "single": ([0, 10, 20], [0.0, 1.0, 2.0], [0.0, 0.7, -0.3]),
        "pessimistic": ([0, 10], [0.0, 0.5], [0.0, 0.6]),
    }
    plot_overoptimization(runs, tmp_path / "plot.png", xlabel="√KL (√nats)", ylabel="reward (sd)")
    assert imread(tmp_path / "plot.png").std() > 0.01
    (axes,) = figure().axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("√KL (√nats)", "reward (sd)")
    proxy, gold, best, *second = axes.lines
    assert proxy.get_xydata()[:, 1].tolist() == [0.0, 1.0, 2.0]
    assert gold.get_xydata()[:, 1].tolist() == [0.0, 0.7, -0.3]
    assert best.get_xydata().tolist() == [[10, 0.7]]
    assert {proxy.get_color(), gold.get_color(), best.get_color()} == {"C0"}
    assert {line.get_color() for line in second} == {"C1"}
    assert proxy.get_linestyle() != gold.get_linestyle()
    labels = [text.get_text() for text in figure().legends[0].get_texts()]
    assert labels == ["single", "pessimistic", "proxy", "gold, and its best"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "at least one run"),
        (
            {"a": ([0, 1], [0.0], [0.0, 1.0])},
            r"`runs\['a'\]` must be \(x, proxy, gold\) of one length, got lengths \[2, 1, 2\]",
        ),
        ({"a": ([], [], [])}, "of one length"),
        ({"a": ([0], [float("nan")], [0.0])}, "must be finite"),
    ],
)
def test_bad_runs(runs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_overoptimization(runs, tmp_path / "plot.png")


def test_bad_bins(bins, tmp_path):
    with pytest.raises(ValueError, match="`bins` must hold at least one model"):
        plot_reliability({}, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="`num_pairs` must be at least 1, got 0"):
        plot_reliability(bins, tmp_path / "plot.png", num_pairs=0)
