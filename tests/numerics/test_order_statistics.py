"""Best-of-n by a proxy, against all subsets, exact distributions and enumeration."""

import math
from itertools import combinations

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics.order_statistics import best_of_n_kl_bound, expected_best_of_n


def best_of_subset(proxy: list[float], scores: list[float]) -> float:
    best = [score for value, score in zip(proxy, scores, strict=True) if value == max(proxy)]
    return sum(best) / len(best)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_average_over_all_subsets(n, tied):
    generator = torch.Generator().manual_seed(1)
    proxy, scores = torch.randn(2, 3, 7, generator=generator)
    if tied:
        proxy = proxy.round()
    subsets = list(combinations(range(7), n))
    expected = sum(
        best_of_subset([row[i] for i in subset], [score[i] for i in subset])
        for row, score in zip(proxy.tolist(), scores.tolist(), strict=True)
        for subset in subsets
    ) / (3 * len(subsets))
    assert_close(expected_best_of_n(proxy, scores, [n]), torch.tensor([expected]))


def test_ends_of_the_range():
    proxy = torch.tensor([[3.0, 1.0, 2.0, -5.0]])
    scores = torch.tensor([[10.0, 20.0, 40.0, 70.0]])
    assert_close(expected_best_of_n(proxy, scores, [1, 4]), torch.tensor([35.0, 10.0]))


def test_order_of_the_draws_does_not_matter():
    proxy, scores = torch.randn(2, 2, 50, generator=torch.Generator().manual_seed(2))
    proxy = (2 * proxy).round()  # ties
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    ns = [1, 2, 8, 50]
    assert_close(
        expected_best_of_n(proxy, scores, ns), expected_best_of_n(proxy[:, shuffled], scores[:, shuffled], ns)
    )


def test_unbiased_for_the_law_of_the_maximum():
    # proxy uniform on {0, 1, 2, 3} with unequal weights, score a function of it: E = Σ score·(F(r)ⁿ − F⁻(r)ⁿ)
    probs, worth, n = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.0, 2.0, 1.0, -3.0]), 5
    above = probs.cumsum(0)
    expected = (worth * (above**n - (above - probs) ** n)).sum()
    draws = torch.multinomial(probs, 4_000 * 8, replacement=True, generator=torch.Generator().manual_seed(4))
    draws = draws.view(4_000, 8)
    each = torch.cat([expected_best_of_n(row[None].float(), worth[row][None], [n]) for row in draws])
    assert_close(expected_best_of_n(draws.float(), worth[draws], [n]), each.mean()[None])
    off = (each.mean() - expected) / (each.std() / math.sqrt(len(each)))
    assert abs(off) < 4, f"off by {off:.1f} standard errors"


def test_exact_at_many_draws():
    # proxy = score = 1 … N: the mean of the maximum of n without replacement is n·(N + 1)/(n + 1)
    num_draws = 2_000
    ranks = torch.arange(1.0, num_draws + 1)[None]
    ns = [1, 16, 900, 1_999]
    expected = torch.tensor([n * (num_draws + 1) / (n + 1) for n in ns])
    assert_close(expected_best_of_n(ranks, ranks, ns), expected)


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_kl_bound_is_reached_without_ties_only(n):
    # under the prior the rank of a completion is uniform on N; best of n has (k/N)ⁿ − ((k−1)/N)ⁿ at rank k
    def kl(num_ranks: int) -> float:
        above = torch.arange(num_ranks + 1, dtype=torch.float64) / num_ranks
        best = (above**n).diff()
        return torch.xlogy(best, best * num_ranks).sum().item()

    bound = best_of_n_kl_bound(n)
    assert kl(200_000) == pytest.approx(bound, abs=1e-3)
    assert n == 1 or kl(2) < bound - 0.05


def test_over_optimisation_on_the_toy(toy):
    # a proxy that is gold but for one completion that it loves and gold hates
    gold = toy.rewards[:1]
    proxy = gold.clone()
    loved = gold.argmin()
    proxy[0, loved] = gold.max() + 1
    ns = [1, 2, 8, gold.size(1)]
    by_proxy, by_gold = expected_best_of_n(proxy, gold, ns), expected_best_of_n(gold, gold, ns)
    assert_close(by_proxy[0], by_gold[0])
    assert (by_proxy[1:] < by_gold[1:]).all()
    assert_close(by_proxy[-1], gold.min())
    assert (expected_best_of_n(proxy, proxy, ns).diff() > 0).all()


@pytest.mark.parametrize(
    ("proxy", "scores", "ns", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), [1], r"same shape \(prompts, draws\), got \(2, 3\) and \(2, 4\)"),
        (torch.zeros(3), torch.zeros(3), [1], "same shape"),
        (torch.zeros(2, 0), torch.zeros(2, 0), [1], "same shape"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [4], "from 1 to the number of draws a prompt, 3, got 4"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [0], "got 0"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [1.5], "got 1.5"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [], r"at least one n, got \[\]"),
        (torch.tensor([[0.0, torch.nan]]), torch.zeros(1, 2), [1], "`proxy` must be finite"),
        (torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]]), [1], "`scores` must be finite"),
    ],
)
def test_bad_input(proxy, scores, ns, message):
    with pytest.raises(ValueError, match=message):
        expected_best_of_n(proxy, scores, ns)


@pytest.mark.parametrize("n", [0, -1, 2.0])
def test_bad_n(n):
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1"):
        best_of_n_kl_bound(n)
