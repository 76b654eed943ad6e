import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from torch.testing import assert_close

from rlhf_bayes.numerics import forward_kl, jeffreys, js, reverse_kl, tv

P = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]], dtype=torch.float64)
Q = torch.tensor([[0.3, 0.3, 0.4], [0.25, 0.05, 0.7]], dtype=torch.float64)


def test_against_scipy():
    assert_close(forward_kl(P.log(), Q.log()), torch.tensor([entropy(p, q) for p, q in zip(P, Q, strict=True)]))
    assert_close(reverse_kl(P[0].log(), Q[0].log()), torch.tensor(entropy(Q[0], P[0])))
    assert_close(jeffreys(P[0].log(), Q[0].log()), torch.tensor(entropy(P[0], Q[0]) + entropy(Q[0], P[0])))
    expected = [jensenshannon(p, q) ** 2 for p, q in zip(P, Q, strict=True)]
    assert_close(js(P.log(), Q.log()), torch.tensor(expected))


def test_total_variation_is_the_largest_difference_over_events():
    events = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)  # (8, 3)
    assert_close(tv(P.log(), Q.log()), ((P - Q) @ events.T).max(-1).values)


def test_disjoint_supports():
    left, right = torch.tensor([1.0, 0.0, 0.0]).log(), torch.tensor([0.0, 0.5, 0.5]).log()
    assert forward_kl(left, right) == torch.inf
    assert reverse_kl(left, right) == torch.inf
    assert_close(js(left, right), torch.tensor(math.log(2)))
    assert_close(tv(left, right), torch.tensor(1.0))


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jeffreys, js, tv])
def test_zero_at_equality_with_a_finite_gradient(divergence):
    logits = torch.tensor([0.5, -1.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    log_q = logits.log_softmax(-1)
    divergence(log_q.detach(), log_q).backward()
    assert_close(divergence(log_q, log_q), torch.tensor(0.0, dtype=torch.float64))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jeffreys, js, tv])
def test_log_densities_are_refused(divergence):
    with pytest.raises(ValueError, match=r"`log_[pq]` must be normalised"):
        divergence(P.log(), Q.log() + 0.5)
    with pytest.raises(ValueError, match="log-mass nan"):
        divergence(P.log(), torch.full_like(Q, torch.nan))
