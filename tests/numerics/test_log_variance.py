import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics.log_variance import log_variance_centres, log_variance_loss

GROUPS = torch.tensor([0, 0, 0, 0, 1, 1])
DRAWN = torch.tensor([3, 17, 5, 3, 30, 8])


@pytest.fixture(scope="module")
def logits(toy):
    return toy.log_probs(toy.random_policy(noise=0.3, seed=4))[1].detach().double().requires_grad_()


@pytest.fixture(scope="module")
def target(toy):
    """log π0 and log_likelihood of a prompt, (N,) in fp64."""
    return toy.log_prior[1].double().log_softmax(-1), toy.log_likelihood[1].double()


def loss_of(log_policy, log_prior, log_likelihood, groups, huber_delta=None, log_z=None, forbidden_gap=1.0):
    centres = log_variance_centres(log_policy, log_prior, log_likelihood, groups, huber_delta, log_z)
    return log_variance_loss(log_policy, log_prior, log_likelihood, centres, huber_delta, forbidden_gap)


def test_mean_over_a_prompt_is_half_the_unbiased_variance(logits, target):
    log_policy = logits.detach().log_softmax(-1)[DRAWN]
    log_prior, log_likelihood = (x[DRAWN] for x in target)
    loss = loss_of(log_policy, log_prior, log_likelihood, GROUPS)
    difference = log_policy - log_prior - log_likelihood
    assert_close(loss[:4].mean(), 0.5 * difference[:4].var())
    assert_close(loss[4:].mean(), 0.5 * difference[4:].var())


def test_gradient_is_that_of_the_reverse_kl_with_a_leave_one_out_baseline(logits, target):
    """Of the same draws: Σ_i (d_i − mean of the others)·∇log π(x_i) / n, written out."""
    log_prior, log_likelihood = target
    log_policy = logits.log_softmax(-1)
    loss = loss_of(log_policy[DRAWN], log_prior[DRAWN], log_likelihood[DRAWN], GROUPS).mean()
    by_loss = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    difference = (log_policy.detach() - log_prior - log_likelihood)[DRAWN]
    siblings = [[j for j in range(6) if GROUPS[j] == GROUPS[i] and j != i] for i in range(6)]
    baseline = torch.stack([difference[others].mean() for others in siblings])
    surrogate = ((difference - baseline) * log_policy[DRAWN]).mean()
    assert_close(by_loss, torch.autograd.grad(surrogate, logits)[0])


def test_expected_gradient_on_policy_is_that_of_the_reverse_kl(logits, target):
    """By enumeration of every pair of draws; and the centre, though constant, is as good as one with gradient."""
    log_prior, log_likelihood = target
    log_policy = logits.log_softmax(-1)
    n = len(logits)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))  # (n², 2)
    drawn, groups = pairs.flatten(), torch.arange(n * n).repeat_interleave(2)
    loss = loss_of(log_policy[drawn], log_prior[drawn], log_likelihood[drawn], groups).view(-1, 2).mean(-1)
    probability = log_policy.detach()[pairs].sum(-1).exp()
    by_loss = torch.autograd.grad((probability * loss).sum(), logits, retain_graph=True)[0]
    log_posterior = (log_prior + log_likelihood).log_softmax(-1)
    reverse_kl = (log_policy.exp() * (log_policy - log_posterior)).sum()
    assert_close(by_loss, torch.autograd.grad(reverse_kl, logits)[0])


@pytest.mark.parametrize("huber_delta", [None, 0.3])
def test_nothing_is_left_at_the_posterior_whoever_drew(target, huber_delta):
    log_prior, log_likelihood = target
    logits = (log_prior + log_likelihood).clone().requires_grad_()
    log_policy = logits.log_softmax(-1)
    drawn = torch.arange(len(logits))
    groups = drawn % 7
    arguments = log_policy[drawn], log_prior, log_likelihood, groups
    assert_close(loss_of(*arguments, huber_delta=huber_delta), torch.zeros(len(logits), dtype=torch.float64))
    centres = log_variance_centres(*arguments, huber_delta)
    log_z = (log_prior + log_likelihood).logsumexp(-1)
    assert_close(centres.centre, -log_z.expand(len(logits)))
    gradient = torch.autograd.grad(loss_of(*arguments, huber_delta=huber_delta).sum(), logits)[0]
    assert_close(gradient, torch.zeros_like(gradient))


def test_an_outlier_beyond_huber_hardly_moves_the_others():
    log_policy = torch.tensor([-3.0, -3.2, -2.9, 47.0], dtype=torch.float64, requires_grad=True)
    zeros, groups = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    centres = log_variance_centres(log_policy, zeros, zeros, groups, huber_delta=1.0)
    # the clipped deviations sum to 0: the outlier adds 1, the rest pull back by as much
    assert_close(centres.centre[0].item(), (-9.1 + 1) / 3)
    assert log_variance_centres(log_policy, zeros, zeros, groups).centre[0] > 9
    loss = log_variance_loss(log_policy, zeros, zeros, centres, huber_delta=1.0)
    gradient = torch.autograd.grad(loss.sum(), log_policy)[0]
    assert_close(gradient[3].item(), 4 / 3)
    assert_close(gradient.sum().item(), 0.0)
    assert_close(loss[3].item(), 4 / 3 * (47 + 8.1 / 3 - 0.5))


def test_huber_beyond_every_deviation_is_the_square(logits, target):
    log_policy = logits.detach().log_softmax(-1)[DRAWN]
    arguments = log_policy, target[0][DRAWN], target[1][DRAWN], GROUPS
    assert_close(loss_of(*arguments, huber_delta=100.0), loss_of(*arguments))
    assert_close(loss_of(*arguments, huber_delta=math.inf), loss_of(*arguments))


def test_forbidden_completions_by_hand():
    log_policy = torch.tensor([-1.0, -2.0, -1.5, -2.5, -20.0], requires_grad=True)
    log_prior = torch.tensor([-1.5, -1.5, -2.0, -2.0, -2.0])
    log_likelihood = torch.tensor([0.0, 0.0, -torch.inf, torch.nan, -torch.inf])
    log_z, groups = torch.full((5,), -0.7), torch.zeros(5, dtype=torch.long)
    loss = loss_of(log_policy, log_prior, log_likelihood, groups, log_z=log_z, forbidden_gap=10.0)
    # d = 0.5 and −0.5 where 0.7 is wanted; half a nat above its prior is 10.5 too many, and 18 below it is enough
    assert_close(loss.detach(), 0.5 * torch.tensor([0.2, 1.2, 10.5, 0.0, 0.0]).square())
    gradient = torch.autograd.grad(loss.sum(), log_policy)[0]
    assert_close(gradient, torch.tensor([-0.2, -1.2, 10.5, 0.0, 0.0]))


def test_the_posterior_of_a_condition_is_the_minimum_and_little_else_is(toy):
    """A logit a completion: descending the loss of every completion ends at the conditioned prior."""
    log_prior = toy.log_prior[2].double().log_softmax(-1)
    forbidden = torch.arange(len(log_prior)) % 3 == 1
    log_likelihood = torch.where(forbidden, -torch.inf, 0.0).double()
    log_z = log_prior[~forbidden].logsumexp(0).expand_as(log_prior)
    groups = torch.zeros(len(log_prior), dtype=torch.long)
    logits = log_prior.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    options = {"log_z": log_z, "forbidden_gap": 9.0}
    for _ in range(1500):
        loss = loss_of(logits.log_softmax(-1), log_prior, log_likelihood, groups, **options).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log_policy = logits.detach().log_softmax(-1)
    assert log_policy[forbidden].exp().sum() <= 1.05 * math.exp(-9) * log_prior[forbidden].exp().sum()
    log_posterior = log_prior[~forbidden].log_softmax(-1)
    assert_close(log_policy[~forbidden].log_softmax(-1), log_posterior, rtol=0, atol=1e-2)


def test_replayed_for_good_the_permitted_do_not_pass_their_posterior():
    """Off policy, where no baseline has mean 0: one hit of four, drawn once and learnt from a thousand times."""
    log_prior = torch.tensor([0.25, 0.25, 0.3, 0.2]).log()
    log_likelihood = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])
    drawn = torch.tensor([0, 1, 2, 2])  # the last was never drawn
    logits = log_prior.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=0.05)
    for _ in range(1000):
        log_policy = logits.log_softmax(-1)[drawn]
        log_z = torch.full((4,), math.log(0.25))
        evidence = (log_prior[drawn], log_likelihood[drawn], drawn * 0)
        loss = loss_of(log_policy, *evidence, log_z=log_z, forbidden_gap=5.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy = logits.detach().softmax(-1)
    # what was never drawn takes the rest
    assert policy[0] + policy[3] == pytest.approx(1.0, abs=0.02)
    assert policy[0].log() - log_prior[0] <= 0.01 - math.log(0.25)


def test_alone_left_out_or_of_unknown_z():
    log_policy = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    log_prior, log_likelihood = torch.full((3,), -2.0), torch.tensor([2.0, torch.nan, 1.0])
    loss = loss_of(log_policy, log_prior, log_likelihood, torch.tensor([0, 1, 1]))
    assert loss.tolist() == [0.0] * 3
    log_likelihood = torch.tensor([2.0, -torch.inf, 1.0])
    log_z = torch.tensor([-torch.inf, torch.nan, torch.nan])
    loss = loss_of(log_policy, log_prior, log_likelihood, torch.tensor([0, 0, 1]), log_z=log_z)
    assert torch.autograd.grad(loss.sum(), log_policy)[0].tolist() == [0.0] * 3


def test_refusals():
    two = torch.zeros(2)
    with pytest.raises(ValueError, match="`log_z` must be given where completions are forbidden"):
        log_variance_centres(two, two, torch.tensor([0.0, -torch.inf]), two.long())
    with pytest.raises(ValueError, match="`huber_delta` must be positive, got 0"):
        log_variance_centres(two, two, two, two.long(), huber_delta=0.0)
    centres = log_variance_centres(two, two, two, two.long())
    with pytest.raises(ValueError, match="`forbidden_gap` must be positive and finite, got -1"):
        log_variance_loss(two, two, two, centres, forbidden_gap=-1.0)
    with pytest.raises(ValueError, match="`log_prior` must be finite, got 1 that"):
        log_variance_loss(two, torch.tensor([0.0, -torch.inf]), two, centres)
    with pytest.raises(ValueError, match=r"got \+inf"):
        log_variance_loss(two, two, two + torch.inf, centres)
    with pytest.raises(ValueError, match="same shape"):
        log_variance_loss(two, two[:1], two, centres)
    with pytest.raises(ValueError, match="`groups` must be"):
        log_variance_centres(two, two, two, torch.zeros(3, dtype=torch.long))
