"""log Z of prompts while training: against enumeration, leave one out, annealed, saved."""

import math

import pytest
import torch

from rlhf_bayes.objectives.normalizers import Normalizers


def draws(toy, policy, n, seed=0):
    """n completions of each prompt: keys, log π0 − log q, evidence, (P · n,) in an order that is not by prompt."""
    with torch.no_grad():
        log_policy = toy.log_probs(policy)
    index = torch.multinomial(log_policy.exp(), n, replacement=True, generator=torch.Generator().manual_seed(seed))
    keys = torch.tensor([5, -3, 2**62])[:, None].expand(-1, n)
    columns = (keys, (toy.log_prior - log_policy).gather(1, index), toy.log_likelihood.gather(1, index))
    order = torch.randperm(3 * n, generator=torch.Generator().manual_seed(seed))
    return [column.flatten()[order] for column in columns]


def order_of(keys, toy):
    """log Z by enumeration for each row."""
    return toy.log_z().double()[[[5, -3, 2**62].index(key) for key in keys.tolist()]]


def test_estimates_pool_over_policies(toy):
    normalizers = Normalizers(None, False)
    for seed in range(8):
        keys, log_ratios, evidence = draws(toy, toy.random_policy(0.02, seed=3), 100, seed)
        log_zs = normalizers.estimate(keys, log_ratios, evidence, keep=True)
    errors = normalizers.pool.standard_error([str(key) for key in keys.unique().tolist()])
    assert errors.max() < 0.2
    assert (log_zs.pooled - order_of(keys, toy)).abs().max() < 4.5 * errors.max()
    assert torch.equal(log_zs.pooled, normalizers.log_z(keys))
    assert len(normalizers.pool) == 3


def test_without_the_own_draw(toy):
    keys, log_ratios, evidence = draws(toy, toy.random_policy(0.02, seed=3), 12)
    evidence[2] = torch.nan
    normalizers = Normalizers(None, False)
    log_zs = normalizers.estimate(keys, log_ratios, evidence, keep=True)
    weights = (log_ratios + evidence).double().exp()
    outweighing = 0
    for row in range(36):
        own = (keys == keys[row]) & ~weights.isnan()
        assert log_zs.pooled[row] == pytest.approx(weights[own].mean().log().item(), abs=1e-6)
        others = own.clone()
        others[row] = False
        if weights[row] > weights[others].sum():
            outweighing += 1
            others = own
        assert log_zs.others[row] == pytest.approx(weights[others].mean().log().item(), abs=1e-6)
    assert outweighing == 3  # one of each prompt


def test_a_first_hit_is_learnt_from():
    keys, zeros = torch.zeros(4, dtype=torch.long), torch.zeros(4)
    evidence = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf])
    log_zs = Normalizers(0.0, False).estimate(keys, zeros, evidence, keep=True)
    assert log_zs.others.tolist() == pytest.approx([-math.log(3), -math.log(4), -math.log(3), -math.log(3)])
    nothing = Normalizers(0.0, False).estimate(keys, zeros, torch.full((4,), -math.inf), keep=True)
    assert nothing.pooled.tolist() == [-math.inf] * 4


@pytest.mark.parametrize("size", [1.0, 200.0, 600.0])
def test_a_draw_that_outweighs_all_others_is_not_left_out(size):
    """Else p/q of a first hit is e^size, whatever the number of draws."""
    keys, zeros = torch.zeros(4, dtype=torch.long), torch.zeros(4)
    evidence = torch.tensor([-size, 0.0, -size, -size])
    normalizers = Normalizers(None, False)
    others = normalizers.estimate(keys, zeros, evidence, keep=True).others
    weights = evidence.double().exp()
    # 1 of 1 + 3 e⁻¹ is less than half: then it is left out, as the others are
    mine = weights.mean() if size > 2 else (weights.sum() - 1) / 3
    assert others[1].item() == pytest.approx(mine.log().item())
    assert others[0].item() == pytest.approx(((weights.sum() - weights[0]) / 3).log().item())
    # far above all that has been seen: 12 draws now, of which the last 8 count a little less
    late = normalizers.estimate(keys.repeat(2), zeros.repeat(2), torch.tensor([300.0] + [0.0] * 7), keep=False)
    assert 300.0 - late.others[0].item() < math.log(24)


def test_the_bound_holds():
    keys = torch.zeros(3, dtype=torch.long)
    normalizers = Normalizers(0.0, True)
    log_zs = normalizers.estimate(keys, torch.tensor([3.0, 0.0, 0.0]), torch.zeros(3), keep=True)
    assert log_zs.pooled.tolist() == [0.0] * 3
    assert log_zs.others.max() == 0.0
    looser = Normalizers(2.0, True)
    looser.retarget(0.5)  # the bound is that of the evidence, to its power
    assert looser.estimate(keys, torch.full((3,), 9.0), torch.zeros(3), keep=True).pooled.tolist() == [1.0] * 3


def test_nothing_is_kept_that_is_not_to_be(toy):
    normalizers = Normalizers(None, True)
    columns = draws(toy, toy.model, 10)
    normalizers.estimate(*columns, keep=True)
    before, recent = normalizers.log_z(columns[0]), len(normalizers.recent)
    other = normalizers.estimate(*draws(toy, toy.model, 10, seed=1), keep=False)
    assert torch.equal(normalizers.log_z(columns[0]), before)
    assert len(normalizers.recent) == recent
    # but what was known was used
    alone = Normalizers(None, True).estimate(*draws(toy, toy.model, 10, seed=1), keep=False)
    assert not torch.equal(other.pooled, alone.pooled)


@pytest.mark.parametrize("power", [0.5, 0.1])
def test_another_power_is_estimated_from_what_was_drawn(toy, power):
    normalizers = Normalizers(None, True)
    for seed in range(4):
        keys, *columns = draws(toy, toy.random_policy(0.01, seed=3), 500, seed)
        normalizers.estimate(keys, *columns, keep=True)
    normalizers.retarget(power)
    expected = toy.log_z(power * toy.log_likelihood).double()
    found = normalizers.log_z(torch.tensor([5, -3, 2**62]))
    errors = normalizers.pool.standard_error(["5", "-3", str(2**62)])
    assert ((found - expected) / errors).abs().max() < 4.5
    assert (expected - toy.log_z()).abs().min() > 10 * errors.max()
    # and back again
    normalizers.retarget(1.0)
    assert (normalizers.log_z(keys) - order_of(keys, toy)).abs().max() < 0.3


def test_it_goes_on_from_its_state(toy, tmp_path):
    normalizers = Normalizers(6.0, True)
    normalizers.retarget(0.5)
    for seed in range(2):
        normalizers.estimate(*draws(toy, toy.model, 5, seed), keep=True)
    torch.save(normalizers.state_dict(), tmp_path / "state.pt")
    other = Normalizers(6.0, True)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    columns = draws(toy, toy.model, 5, seed=2)
    for power in (0.5, 0.8):
        both = []
        for each in (normalizers, other):
            each.retarget(power)
            both.append(each.estimate(*columns, keep=True).others)
        assert torch.equal(*both)
