import math

import pytest
import torch
from scipy.stats import entropy
from torch.testing import assert_close

from rlhf_bayes.numerics import exact_token_kl, k1, k2, k3

P = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_expectation_under_p_is_the_exact_kl(estimator):
    expectation = (P * estimator(P.log(), Q.log())).sum()
    assert_close(expectation, torch.tensor(entropy(P, Q)))


@pytest.mark.parametrize("estimator", [k1, k3])
def test_sample_mean_is_within_its_standard_error(estimator):
    tokens = torch.multinomial(P, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimates = estimator(P.log()[tokens], Q.log()[tokens])  # (N,)
    se = estimates.std() / math.sqrt(len(estimates))
    error = (estimates.mean() - entropy(P, Q)).item()
    assert abs(error) < 5 * se, f"off by {error / se:.1f} standard errors"


def test_values_by_hand():
    log_p, log_q = torch.tensor([-1.0]), torch.tensor([-3.0])
    assert_close(k1(log_p, log_q), torch.tensor([2.0]))
    assert_close(k2(log_p, log_q), torch.tensor([2.0]))
    assert_close(k3(log_p, log_q), torch.tensor([math.exp(-2) - 1 + 2]))
    assert_close(k3(log_q, log_p), torch.tensor([math.exp(2) - 1 - 2]))


def test_k2_and_k3_are_never_negative():
    log_p, log_q = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1)).unbind(0)
    assert (k2(log_p, log_q) >= 0).all()
    assert (k3(log_p, log_q) >= 0).all()


def test_k3_keeps_its_digits_near_the_prior():
    estimate = k3(torch.tensor(-1.0), torch.tensor(-1.0 + 2**-10))
    assert_close(estimate.item(), 2**-21 + 2**-30 / 6, rtol=1e-3, atol=0)


def test_k3_in_the_reward_penalises_the_difference_of_both_kls():
    # gradient of E_p[k3] with k3 held constant, as a policy gradient sees it, against that of KL(p‖q) − KL(q‖p)
    logits = P.log().requires_grad_()
    log_p = logits.log_softmax(-1)
    surrogate = (log_p.exp() * k3(log_p.detach(), Q.log())).sum()
    by_reward = torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
    difference = exact_token_kl(log_p, Q.log()) - exact_token_kl(Q.log(), log_p)
    assert_close(by_reward, torch.autograd.grad(difference, logits)[0])


def test_exact_token_kl_matches_scipy():
    assert_close(exact_token_kl(P.log(), Q.log()), torch.tensor(entropy(P, Q)))
    batch = exact_token_kl(torch.stack([P, Q]).log(), torch.stack([Q, P]).log())
    assert_close(batch, torch.tensor([entropy(P, Q), entropy(Q, P)]))


def test_exact_token_kl_with_zeros():
    half = torch.tensor([0.5, 0.5, 0.0]).log()
    third = torch.tensor([1 / 3, 1 / 3, 1 / 3]).log()
    assert_close(exact_token_kl(half, third), torch.tensor(math.log(1.5)))
    assert exact_token_kl(third, half) == torch.inf
    assert exact_token_kl(half, half) == 0


def test_exact_token_kl_gradient_is_finite_at_zero_probability():
    logits = torch.tensor([0.3, -0.2, -torch.inf], requires_grad=True)
    exact_token_kl(logits.log_softmax(-1), torch.tensor([0.2, 0.8, 0.0]).log()).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


def test_exact_token_kl_refuses_different_shapes():
    with pytest.raises(ValueError, match="same shape"):
        exact_token_kl(P.log(), Q[:3].log())
