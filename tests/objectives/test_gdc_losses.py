"""What GDC minimises: one mapping, from which flags, checks and the table of the page come."""

import re
from pathlib import Path

import pytest

from rlhf_bayes import GDCConfig
from rlhf_bayes.numerics import DIVERGENCES
from rlhf_bayes.objectives.gdc_losses import (
    GDC_LOSSES,
    LOG_VARIANCE,
    infinite_where_forbidden,
    names_that_take_forbidden,
)

PAGE = (Path(__file__).parents[2] / "docs" / "control.md").read_text(encoding="utf-8")


def test_the_losses_are_the_divergences_and_the_log_variance():
    assert list(GDC_LOSSES) == [*DIVERGENCES, LOG_VARIANCE]
    assert [name for name, loss in GDC_LOSSES.items() if not loss.has_pseudo_reward] == [LOG_VARIANCE]


def test_the_flag_and_its_help_come_from_them():
    metadata = GDCConfig.__dataclass_fields__["divergence"].metadata
    assert metadata["choices"] == list(GDC_LOSSES)
    assert all(f"'{name}': {loss.help}" in metadata["help"] for name, loss in GDC_LOSSES.items())


def test_the_table_in_the_readme_is_theirs():
    table = PAGE.split("| `divergence` | minimises")[1].split("\n\n")[0]
    rows = re.findall(r'^\| `"(\w+)"` \| (.*) \|$', table, flags=re.MULTILINE)
    assert rows == [(name, loss.help) for name, loss in GDC_LOSSES.items()]


@pytest.mark.parametrize(
    ("divergence", "alpha", "infinite"),
    [("reverse_kl", None, True), ("alpha", 1.0, True), ("alpha", 0.9, False), ("js", None, False)],
)
def test_which_are_infinite_where_completions_are_forbidden(divergence, alpha, infinite):
    assert infinite_where_forbidden(divergence, alpha) == infinite
    assert not infinite_where_forbidden(LOG_VARIANCE)
    with pytest.raises(ValueError, match="`divergence` must be one of"):
        infinite_where_forbidden("kl")


def test_a_message_names_those_that_are_finite():
    names = names_that_take_forbidden()
    assert "'forward_kl'" in names
    assert "'alpha' below 1" in names
    assert names.endswith("or 'log_variance'")
    assert "reverse_kl" not in names
