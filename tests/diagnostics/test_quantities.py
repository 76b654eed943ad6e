"""Reported quantities: each appears in every place that its record names, and nowhere else."""

import copy
import dataclasses
import io
import pickle
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rlhf_bayes.diagnostics import PosteriorFit, ScoredDraws, fit_table, posterior_fits
from rlhf_bayes.diagnostics.callback import PREFIX, _metrics
from rlhf_bayes.diagnostics.quantities import QUANTITIES
from rlhf_bayes.report.run import Run, estimates_of
from rlhf_bayes.report.tables import evaluation_table

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
TEXTS = ["a b", "a b c d e f", "a b", "a b a b a b"]
# of TEXTS, by hand; None where test_diversity.py has it
OF_TEXTS = {
    "distinct_1": 6 / 16,
    "distinct_2": 6 / 12,
    "self_bleu": None,
    "repeated_4grams": 0.5 * (0 + 1 / 3),
    "duplicates": 1 / 4,
}


@pytest.fixture(scope="module")
def fit():
    generator = torch.Generator().manual_seed(0)
    evidence, zeros = torch.randn(2, 40, generator=generator), torch.zeros(2, 40)
    ids, texts = [[[0, 1]] * 40] * 2, [TEXTS * 10] * 2
    draws = ScoredDraws(["a", "b"], ids, texts, zeros, zeros, evidence, zeros, zeros)
    policy = posterior_fits(draws, draws, draws.log_prob, 0.5)[1]
    assert policy.gap.trustworthy
    return dataclasses.replace(policy, forbidden=dataclasses.replace(policy.forbidden, mean=0.5))


def test_every_number_of_a_fit_has_a_record(fit):
    """By name: a field without one would be shown nowhere."""
    numbers = {field.name for field in dataclasses.fields(PosteriorFit)} - {"text_measures", "num_draws"}
    of_fits = {name for name, quantity in QUANTITIES.items() if quantity.places != ("page",)}
    assert numbers | fit.text_measures.keys() == of_fits


@pytest.mark.parametrize("name", QUANTITIES)
def test_it_is_shown_where_its_record_says(fit, name):
    quantity = QUANTITIES[name]
    console = Console(file=io.StringIO(), width=120)
    console.print(fit_table({"policy": fit}))
    rows = [line.split("│")[1].strip() for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert (quantity.title in rows) == ("terminal" in quantity.places)
    found = {"length": {"mean": 3.0, "standard_error": 0.1}} | fit.as_dict()
    page = evaluation_table([Run("a", Path("a"), estimates=estimates_of(found))])
    assert (f">{quantity.title}</abbr></th>" in page) == ("page" in quantity.places)
    metrics = _metrics(fit)
    assert (f"{PREFIX}{name}" in metrics) == ("callback" in quantity.places)
    logged = "callback" in quantity.places and quantity.error_logged
    assert (f"{PREFIX}{name}_standard_error" in metrics) == logged
    if "callback" in quantity.places:
        assert f"/{name}`" in PAGE, "add the metric to the table of docs/metrics.md"


@pytest.mark.parametrize("name", [name for name, quantity in QUANTITIES.items() if quantity.of_texts])
def test_a_measure_of_texts_has_its_value_here(name):
    assert name in OF_TEXTS
    expected = OF_TEXTS[name]
    found = QUANTITIES[name].of_texts(TEXTS)
    assert 0 < found < 1
    assert expected is None or found == pytest.approx(expected)


def test_labels_tell_quantities_apart():
    assert len({quantity.title for quantity in QUANTITIES.values()}) == len(QUANTITIES)


def test_measures_of_texts_are_attributes_and_survive_copies(fit):
    for twin in (fit, copy.deepcopy(fit), pickle.loads(pickle.dumps(fit))):
        assert twin.self_bleu.mean == fit.text_measures["self_bleu"].mean
    assert {"self_bleu", "num_draws"} <= fit.as_dict().keys()
    assert "text_measures" not in fit.as_dict()
    with pytest.raises(AttributeError, match="no attribute 'self_blue'"):
        _ = fit.self_blue


def test_a_file_with_other_numbers_is_still_read():
    run = Run("a", Path("a"), estimates=estimates_of({"an_older_number": {"mean": 1.0, "standard_error": 0.1}}))
    assert "<th>an_older_number</th>" in evaluation_table([run])
