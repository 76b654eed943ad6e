import json
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics import importance_ess, log_z
from rlhf_bayes.numerics.z_pool import ZPool

BATCHES = 8


def pooled(log_weights, bound=None):
    """A pool after batches (T, P, n)."""
    pool = ZPool(bound)
    for batch in log_weights:
        pool.update([str(prompt) for prompt in range(batch.size(0))], batch)
    return pool


def batches_drawn(toy, n, seed, repetitions):
    """Log-weights (R, T, P, n) under proposals that go from the prior towards the posterior, and exact log Z (P,)."""
    generator = torch.Generator().manual_seed(seed)
    log_prior = toy.log_prior.double().log_softmax(-1)
    log_density = log_prior + toy.log_likelihood.double()
    log_weights = []
    for step in range(BATCHES):
        share = 0.7 * step / BATCHES
        log_proposal = (log_prior + share * toy.log_likelihood).log_softmax(-1)  # (P, N)
        drawn = torch.multinomial(log_proposal.exp(), repetitions * n, replacement=True, generator=generator)
        log_weights.append((log_density - log_proposal).gather(1, drawn).view(-1, repetitions, n))
    return torch.stack(log_weights).permute(2, 0, 1, 3), log_density.logsumexp(-1)


@pytest.mark.slow
def test_unbiased_and_better_than_one_batch_or_a_plain_mean(toy):
    repetitions = 1500
    log_weights, exact = batches_drawn(toy, 4, 0, repetitions)
    pools = [pooled(each) for each in log_weights]
    keys = [str(prompt) for prompt in range(len(exact))]
    ratios = torch.stack([(pool.log_z(keys) - exact).exp() for pool in pools])  # (R, P): Ẑ/Z
    se = ratios.std(0) / math.sqrt(repetitions)
    error = ratios.mean(0) - 1
    assert (error.abs() < 5 * se).all(), f"off by {(error / se).tolist()} standard errors"
    one_batch = (log_z(log_weights) - exact).exp()  # (R, T, P)
    mean_square = (ratios - 1).square().mean()
    assert mean_square < 0.8 * (one_batch[:, -1] - 1).square().mean()
    assert mean_square < (one_batch.mean(1) - 1).square().mean()
    # weighed by the ESS of their own draws the same batches are biased
    own = importance_ess(log_weights)  # (R, T, P)
    by_own = (own * one_batch).sum(1) / own.sum(1)
    assert ((by_own.mean(0) - 1) > 5 * by_own.std(0) / math.sqrt(repetitions)).any()


def test_a_rare_condition_counts_its_misses():
    """One hit in 200 and 32 draws a batch: most batches have none, and a weight of 0 would leave only the lucky."""
    generator = torch.Generator().manual_seed(0)
    hits = torch.rand(3000, 1, 32, generator=generator) < 1 / 200
    log_weights = torch.where(hits, 0.0, -torch.inf)
    pool = pooled(log_weights, bound=0.0)
    share = 1 / 200
    se = math.sqrt((1 - share) / share / hits.numel())  # of log Ẑ with equal weights
    error = (pool.log_z(["0"]) - math.log(share)).item()
    assert abs(error) < 5 * se, f"off by {error / se:.1f} standard errors"
    assert_close(pool.standard_error(["0"]).item(), se, rtol=0.1, atol=0)


def test_by_hand():
    pool = ZPool()
    first = torch.tensor([[1.0, 3.0], [2.0, 2.0]]).log()
    second = torch.tensor([[4.0, 0.0], [1.0, 5.0]]).log()
    pool.update(["a", "b"], first)
    assert_close(pool.log_z(["b", "a"]), torch.tensor([2.0, 2.0], dtype=torch.float64).log())
    pool.update(["b", "a"], second)
    # ESS of the other prompt: first 2 for a and 16/10 for b, then 1 for a and 36/26 for b
    a = (3 * 2 + 2 * 3) / (3 + 2)
    b = (2.6 * 2 + (1 + 36 / 26) * 2) / (2.6 + 1 + 36 / 26)
    assert_close(pool.log_z(["a", "b"]), torch.tensor([a, b], dtype=torch.float64).log())
    expected = [math.sqrt(1 / (1.6 + 36 / 26) - 1 / 4), math.sqrt(1 / (2 + 1) - 1 / 4)]
    assert_close(pool.standard_error(["a", "b"]), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_lone_prompt_is_weighed_by_its_previous_batch():
    pool = ZPool()
    for weights in ([1.0, 3.0], [4.0, 0.0], [6.0, 6.0, 6.0, 6.0]):
        pool.update(["a"], torch.tensor([weights]).log())
    own, lagged, lagged_longer = 1 + 1.6, 1 + 1.6, 1 + 4 * 0.5
    expected = (own * 2 + lagged * 2 + lagged_longer * 6) / (own + lagged + lagged_longer)
    assert_close(pool.log_z(["a"]).exp().item(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("past", [0, 2])
def test_leave_one_out_is_the_pool_without_the_draw(past):
    log_weights = torch.randn(past + 1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_weights[-1, 1, 2] = torch.nan
    pool = pooled(log_weights[:past])
    before = pool.state_dict()
    left_out = pool.leave_one_out(["0", "1"], log_weights[-1])
    assert pool.state_dict() == before
    # the batch's weight, shared among its draws; the left-out draw takes its share along
    ess = [importance_ess(log_weights[-1, prompt][~log_weights[-1, prompt].isnan()]) for prompt in range(2)]
    for prompt in range(2):
        sums = [math.exp(x) if past else 0.0 for x in before["entries"].get(str(prompt), [0, 0])[:2]]
        weights = log_weights[-1, prompt].exp()
        n = int((~weights.isnan()).sum())
        share = (1 + ess[1 - prompt]) / n
        for i in range(4):
            others = [weights[j] for j in range(4) if j != i and not weights[j].isnan()]
            expected = (sums[0] + share * sum(others)) / (sums[1] + share * len(others))
            assert_close(left_out[prompt, i], expected.log())


def test_leave_one_out_of_many_draws_keeps_the_digits_of_the_small():
    log_weights = torch.zeros(1, 20_000)
    log_weights[0, 7], log_weights[0, 9] = 600.0, -math.inf
    others = ZPool().leave_one_out(["a"], log_weights)[0]
    assert others[7].item() == pytest.approx(math.log(19_998 / 19_999), abs=1e-9)
    assert others[9].item() == others[11].item() == pytest.approx(600 - math.log(19_999))


def test_leave_one_out_of_a_single_draw_is_the_pool():
    pool = ZPool()
    assert pool.leave_one_out(["a"], torch.tensor([[0.7]])).isnan().all()
    pool.update(["a"], torch.tensor([[0.5]]))
    assert_close(pool.leave_one_out(["a"], torch.tensor([[0.7]])), torch.tensor([[0.5]], dtype=torch.float64))


def test_the_bound_of_a_condition_holds():
    pool = pooled(torch.tensor([[[1.5, 0.5]]]), bound=0.0)
    assert pool.log_z(["0"]).item() == 0.0
    assert pool.leave_one_out(["0"], torch.tensor([[2.0, 0.5]])).max() == 0.0


def test_prompts_without_a_hit_or_without_draws():
    pool = ZPool()
    pool.update(["none", "left out"], torch.tensor([[-torch.inf, -torch.inf], [torch.nan, torch.nan]]))
    assert pool.log_z(["none", "left out", "new"]).tolist() == pytest.approx(
        [-math.inf, math.nan, math.nan], nan_ok=True
    )
    assert pool.standard_error(["none", "new"]).tolist() == [math.inf, math.inf]
    assert ("none" in pool, "left out" in pool, len(pool)) == (True, False, 1)
    pool.update(["none"], torch.tensor([[0.0, -torch.inf]]))
    assert_close(pool.log_z(["none"]).item(), math.log(0.25))


def test_state_survives_json_and_huge_weights(toy):
    log_weights, _ = batches_drawn(toy, 4, 1, 1)
    pool = pooled(log_weights[0] + 3000)
    other = ZPool()
    other.load_state_dict(json.loads(json.dumps(pool.state_dict())))
    for each in (pool, other):
        each.update(["1", "7"], torch.tensor([[2999.0, 3001.0], [0.0, 1.0]]))
    keys = ["0", "1", "2", "7"]
    assert torch.equal(pool.log_z(keys), other.log_z(keys))
    assert pool.log_z(keys).isfinite().all()
    with pytest.raises(ValueError, match="`log_z_bound` must be that of the saved pool, None, got 0"):
        ZPool(0.0).load_state_dict(pool.state_dict())


def test_refusals():
    pool = ZPool()
    with pytest.raises(ValueError, match=r"`log_weights` must be \(P, n\) for P different keys, got \(2, 3\) for 2"):
        pool.update(["a", "a"], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="for 1 keys"):
        pool.leave_one_out(["a"], torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"got \+inf"):
        pool.update(["a"], torch.full((1, 3), torch.inf))
    with pytest.raises(ValueError, match="`log_z_bound` must be finite, got inf"):
        ZPool(math.inf)
