import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics import importance_ess, khat, khat_threshold, log_z, log_z_standard_error
from rlhf_bayes.numerics.log_weights import log_importance_ess, weighted_mean

# an unnormalised target and a proposal on five states, one of them forbidden
LOG_DENSITY = torch.tensor([0.3, -1.2, -torch.inf, 1.7, -0.4], dtype=torch.float64)
PROPOSAL = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.2], dtype=torch.float64)


def drawn_log_weights(n, seed):
    states = torch.multinomial(PROPOSAL, n, replacement=True, generator=torch.Generator().manual_seed(seed))
    return LOG_DENSITY[states] - PROPOSAL.log()[states]


def test_log_z_of_every_state_once_per_its_proposal_count_is_exact():
    counts = (PROPOSAL * 10).round().long()
    log_weights = (LOG_DENSITY - PROPOSAL.log()).repeat_interleave(counts)
    assert_close(log_z(log_weights), LOG_DENSITY.exp().sum().log())


def test_mean_weight_is_unbiased_for_z_by_enumeration_of_every_pair_of_draws():
    log_weights = LOG_DENSITY - PROPOSAL.log()
    pairs = torch.stack([log_weights[:, None].expand(5, 5), log_weights[None, :].expand(5, 5)], -1)  # (5, 5, 2)
    expectation = (PROPOSAL[:, None] * PROPOSAL * log_z(pairs).exp()).sum()
    assert_close(expectation, LOG_DENSITY.exp().sum())


def test_standard_error_of_log_z_is_the_spread_over_repetitions():
    n = 400
    log_weights = torch.stack([drawn_log_weights(n, seed) for seed in range(300)])  # (300, n)
    estimates = log_z(log_weights)
    spread = estimates.std()
    # the standard deviation of 300 draws is known to 1/√600
    assert_close(log_z_standard_error(log_weights).mean(), spread, rtol=5 / math.sqrt(600), atol=0)
    error = (estimates.mean() - LOG_DENSITY.exp().sum().log()).item()
    assert abs(error) < 5 * spread / math.sqrt(300) + spread**2


def test_ess_by_hand():
    log_weights = torch.tensor([0.0, 0.0, 0.0, math.log(3.0)]) + 500
    assert_close(importance_ess(log_weights), torch.tensor(36 / 12), rtol=1e-4, atol=0)
    assert_close(log_importance_ess(torch.zeros(2, 7)), torch.full((2,), math.log(7)))
    assert_close(importance_ess(torch.tensor([[0.0, -torch.inf], [1.0, 1.0]])), torch.tensor([1.0, 2.0]))
    assert_close(importance_ess(torch.tensor([[0.0, 1.0], [-torch.inf, 1.0]]), dim=0), torch.tensor([1.0, 2.0]))


def test_standard_error_is_the_coefficient_of_variation_over_root_n():
    log_weights = drawn_log_weights(50, seed=3)
    weights = log_weights.exp()
    expected = weights.std(unbiased=False) / weights.mean() / math.sqrt(50)
    assert_close(log_z_standard_error(log_weights), expected)


def test_degenerate_weights():
    nothing = torch.full((4,), -torch.inf)
    assert log_z(nothing) == -torch.inf
    assert importance_ess(nothing) == 0
    assert log_z_standard_error(nothing) == torch.inf
    assert log_z_standard_error(torch.tensor([2.0])) == torch.inf
    assert log_z_standard_error(torch.full((9,), 0.1)) < 1e-3
    with pytest.raises(ValueError, match="at least one draw"):
        log_z(torch.empty(0))


@pytest.mark.parametrize("n", [25, 60, 225, 226, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_khat_matches_arviz(n, scale):
    psislw = pytest.importorskip("arviz_stats.base").array_stats.psislw
    log_weights = scale * np.random.default_rng(n).normal(size=n) - 700.0
    assert_close(khat(torch.from_numpy(log_weights)).item(), float(psislw(-log_weights)[1]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_recovers_the_shape_of_pareto_weights(shape):
    uniform = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    log_weights = -shape * uniform.log()  # a Pareto tail of index 1/shape
    # asymptotic standard error of the shape from m exceedances: (1 + k)/√m
    assert abs(khat(log_weights).item() - shape) < 4 * (1 + shape) / math.sqrt(3 * math.sqrt(40_000))


def test_khat_ignores_a_common_constant_and_the_order():
    log_weights = drawn_log_weights(0 + 500, seed=1) + torch.randn(
        500, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    permuted = log_weights[torch.randperm(500, generator=torch.Generator().manual_seed(3))]
    assert_close(khat(log_weights), khat(permuted + 1234.0), rtol=1e-6, atol=0)


def test_forbidden_draws_count_as_weight_zero():
    log_weights = 2 * torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forbidden = torch.where(torch.arange(500) % 3 == 0, -torch.inf, log_weights)
    tiny = torch.where(torch.arange(500) % 3 == 0, -1e4, log_weights)
    assert_close(khat(forbidden), khat(tiny))
    mostly_forbidden = torch.where(torch.arange(500) < 490, -torch.inf, log_weights)
    assert khat(mostly_forbidden).isfinite()


def test_khat_at_the_edges():
    assert khat(torch.full((100,), 0.7)) == -torch.inf
    assert khat(torch.randn(24, generator=torch.Generator().manual_seed(0))) == torch.inf
    assert khat(torch.full((100,), -torch.inf)) == torch.inf
    assert khat(torch.cat([torch.zeros(98), torch.tensor([4.0, 5.0])])) == torch.inf
    # half of the draws share the largest weight: bounded
    assert khat(torch.cat([torch.zeros(50), torch.ones(50)])) == -torch.inf
    with pytest.raises(ValueError, match="finite or -inf"):
        khat(torch.tensor([0.0, torch.nan]))
    with pytest.raises(ValueError, match="once per prompt"):
        khat(torch.zeros(2, 30))


def test_khat_threshold():
    assert khat_threshold(100) == 0.5
    assert khat_threshold(10**6) == 0.7
    with pytest.raises(ValueError, match="at least 2, got 1"):
        khat_threshold(1)


def test_weighted_mean_by_hand():
    values = torch.tensor([[1.0, 4.0, -torch.inf], [2.0, 2.0, 5.0]], dtype=torch.float64)
    log_weights = torch.tensor([[3.0, 3.0 + math.log(2.0), -torch.inf], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(weighted_mean(values, log_weights), torch.tensor([3.0, 3.0], dtype=torch.float64))
    assert weighted_mean(values[0, [0, 2]], torch.zeros(2)) == -torch.inf
