"""Fits and curves as a user sees them."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from rlhf_bayes.diagnostics import (
    Estimate,
    ScoredDraws,
    fit_table,
    fit_tables,
    plot_history,
    posterior_fits,
    samples_table,
)

GOOD = Estimate(1.234, 0.05, 1.1, 1.4, 0.04)
BAD = Estimate(7.0, 3.0, 1.0, 13.0, 3.0, trustworthy=False)


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(0)
    evidence, zeros = torch.randn(2, 40, generator=generator), torch.zeros(2, 40)
    ids, texts = [[[0, 1]] * 40] * 2, [["one two"] * 40, ["three [four]"] * 40]
    return ScoredDraws(["a", "b"], ids, texts, zeros, zeros, evidence, zeros, zeros)


def shown(table):
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def test_a_row_for_each_quantity(draws):
    prior, policy, _ = posterior_fits(draws, draws, draws.log_prob, 0.5)
    text = shown(fit_table({"prior": prior, "policy": policy}, title="Fit"))
    (row,) = (line for line in text.splitlines() if "log Z" in line)
    assert row.count(str(policy.log_z)) == 2
    assert "Fit" in text
    assert "forbidden" not in text
    (row,) = (line for line in text.splitlines() if "duplicates (share)" in line)
    assert row.count("0.975 [0.913, 0.997]") == 2  # 39 of 40 for both prompts, so 78 of 80: scipy's exact interval
    assert "[low, high] 95% interval" in text
    assert "±" not in text.replace("for ±", "")  # two prompts have too few for it


def test_without_a_posterior_the_rest_is_said(draws):
    _, policy, _ = posterior_fits(draws, draws, draws.log_prob, 0.5)
    fit = policy.without_posterior()
    assert fit.elbo is fit.log_z is fit.gap is fit.forward_kl is fit.tv is None
    assert fit.reward == policy.reward
    text = shown(fit_table({"policy": fit}))
    (row,) = (line for line in text.splitlines() if "log Z" in line)
    assert "–" in row


def test_samples(draws):
    text = shown(samples_table(draws.prompts, {"prior": draws, "policy": draws}))
    assert text.count("one two") == 2
    assert text.count("three [four]") == 2  # no markup of rich's


def test_curves(draws, tmp_path):
    history = [{"step": step, "reward": 0.1 * step, "posterior/elbo": step - 3.0} for step in (1, 2, 3)]
    _, policy, _ = posterior_fits(draws, draws, draws.log_prob, 0.5)
    unknown = {"posterior_reward": BAD, "posterior_kl_to_prior": None}
    fits = {
        "a.png": replace(policy, log_z=GOOD, **unknown),
        "b.png": replace(policy, log_z=BAD, **unknown),
        "c.png": None,
    }
    for name, fit in fits.items():
        plot_history(history, fit, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_the_moving_average_is_narrower_at_the_ends():
    values = [float(step**2) for step in range(40)]
    averages = fit_tables._moving_average(values)
    assert averages[20] == pytest.approx(sum(step**2 for step in range(18, 23)) / 5)
    assert averages[0] == pytest.approx((0 + 1 + 4) / 3)
    assert averages[-1] == pytest.approx((37**2 + 38**2 + 39**2) / 3)
    assert fit_tables._moving_average(values[:3]) == values[:3]
