"""The page on claims: what is written comes back, verdicts are computed, texts are escaped, nothing is loaded."""

import math

import pytest

from rlhf_bayes.report.claims_page import ClaimResult, Statement, write_claims_page
from rlhf_bayes.report.figures import panels_of


@pytest.fixture
def result():
    statements = [
        Statement("x < y is shown", 2.0, 0.1, freedom=2, low=1.0),
        Statement("one seed", 2.0, math.nan, freedom=0, low=1.0),
        Statement("too high", -2e-3, 0.0, low=-1e-3, high=1e-3, unit="nats"),
    ]
    text, settings, samples = ["Claim: <b>"], {"seeds": 3}, {"a": ["<i>"]}
    return ClaimResult("collapse", "A <title>", text, statements, "caption", settings, 12.0, samples)


def save(result, folder):
    figure, (axes,) = panels_of(1)
    axes.plot([0, 1])
    result.save(folder, figure, [{"method": "ppo", "KL": 0.123456}, {"method": "rloo", "KL": 2}])


def test_what_is_written_comes_back(result, tmp_path):
    save(result, tmp_path)
    (again,) = [ClaimResult.read(path) for path in tmp_path.glob("*.json")]
    assert [str(statement) for statement in again.statements] == [str(statement) for statement in result.statements]
    assert "Infinity" not in (tmp_path / "collapse.claim.json").read_text()
    assert (tmp_path / "collapse.csv").read_text().splitlines() == ["method,KL", "ppo,0.123456", "rloo,2"]


def test_verdicts(result):
    assert [statement.verdict for statement in result.statements] == ["agrees", "cannot tell", "disagrees"]
    assert result.verdict == "disagrees"
    assert [statement.number for statement in result.statements] == ["2 ± 0.1", "2 (one value)", "−0.002 nats"]
    assert Statement("no run", math.nan, math.nan, high=1.0).number == "not known"
    assert result.statements[0].bounds == "above 1"


def test_the_page_is_self_contained_and_escaped(result, tmp_path):
    save(result, tmp_path)
    page = write_claims_page(tmp_path).read_text()
    assert "A &lt;title&gt;" in page
    assert "Claim: &lt;b&gt;" in page
    assert "&lt;i&gt;" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert "too high (−0.002 nats: disagrees)" in page
    assert "0.1235" in page


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold results"):
        write_claims_page(tmp_path)
