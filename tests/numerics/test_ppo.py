import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics.ppo import (
    adapted_beta,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    kl_penalised_advantages,
    prompt_baseline,
    token_rewards,
)

MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.1, 2.0, -2.2),  # inside
        (1.5, 2.0, -2.6),  # clipped above at 1.3
        (1.5, -2.0, 3.0),  # a worse action made likelier is not clipped
        (0.5, -2.0, 1.6),  # clipped below at 0.8
        (0.5, 2.0, -1.0),  # a better action made rarer is not clipped
    ],
)
def test_policy_loss_by_hand(ratio, advantage, expected):
    log_ratio = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss = clipped_policy_loss(log_ratio, torch.tensor([[advantage]]), epsilon_low=0.2, epsilon_high=0.3)
    assert_close(loss, torch.tensor([[expected]]))
    loss.sum().backward()
    clipped = expected != pytest.approx(-ratio * advantage)
    assert_close(log_ratio.grad, torch.tensor([[0.0 if clipped else -ratio * advantage]]))


def test_policy_loss_gradient_on_policy_is_the_policy_gradient():
    logits = torch.tensor([0.2, -0.5, 1.0], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    log_prob = logits.log_softmax(-1)
    loss = clipped_policy_loss(log_prob - log_prob.detach(), advantages, 0.2, 0.2).sum()
    by_loss = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert_close(by_loss, -torch.autograd.grad((log_prob * advantages).sum(), logits)[0])


def test_policy_loss_refusals():
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"`epsilon_low` must be in \[0, 1\], got 1.2"):
        clipped_policy_loss(one, one, 1.2, 0.2)
    with pytest.raises(ValueError, match=r"`epsilon_high` must be at least 0, got -0\.1"):
        clipped_policy_loss(one, one, 0.2, -0.1)


@pytest.mark.parametrize(
    ("value", "expected", "gradient"),
    [
        (1.1, 0.5 * 0.9**2, -0.9),  # inside the clip range
        (1.5, 0.5 * 0.8**2, 0.0),  # moved towards the return, too far: held at 1.2
        (0.5, 0.5 * 1.5**2, -1.5),  # moved away: the unclipped error is larger and pulls back
    ],
)
def test_value_loss_by_hand(value, expected, gradient):
    values = torch.tensor([[value]], requires_grad=True)
    loss = clipped_value_loss(values, torch.tensor([[1.0]]), torch.tensor([[2.0]]), value_clip=0.2)
    assert_close(loss, torch.tensor([[expected]]))
    loss.sum().backward()
    assert_close(values.grad, torch.tensor([[gradient]]))


def test_value_loss_without_clip():
    loss = clipped_value_loss(torch.tensor([[1.5]]), torch.tensor([[9.0]]), torch.tensor([[2.0]]), value_clip=None)
    assert_close(loss, torch.tensor([[0.125]]))
    with pytest.raises(ValueError, match="`value_clip` must be positive, got 0"):
        clipped_value_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), value_clip=0)


def test_explained_variance():
    returns = torch.tensor([[1.0, 4.0, 2.0], [5.0, torch.nan, torch.inf], [torch.nan] * 3])
    assert_close(explained_variance(returns + 3.0, returns, MASK), torch.tensor(1.0))
    assert_close(explained_variance(torch.full((3, 3), 7.0), returns, MASK), torch.tensor(0.0))
    # the fit of a regression: the square of the correlation
    values = torch.tensor([[0.0, 2.0, 3.0], [4.0, 0.0, 0.0], [0.0] * 3])
    x, y = values[MASK], returns[MASK]
    correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
    fitted = values * (correlation * y.std() / x.std())
    assert_close(explained_variance(fitted, returns, MASK), correlation.square())
    assert explained_variance(values, torch.ones(3, 3), MASK).isnan()


def test_token_rewards_by_hand():
    token_kl = torch.tensor([[0.1, -0.2, 0.4], [0.3, torch.nan, torch.inf], [torch.nan] * 3])
    rewards = token_rewards(torch.tensor([5.0, -1.0, 7.0]), token_kl, MASK, beta=0.5)
    assert_close(rewards, torch.tensor([[-0.05, 0.1, 4.8], [-1.15, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_token_rewards_sum_to_the_penalised_reward():
    generator = torch.Generator().manual_seed(0)
    log_policy, log_prior = torch.randn(2, 3, 3, generator=generator).unbind(0)
    score = torch.tensor([5.0, -1.0, 7.0])
    rewards = token_rewards(score, log_policy - log_prior, MASK, beta=0.3)
    for row, length in ((0, 3), (1, 1)):
        log_ratio = log_policy[row, :length].sum() - log_prior[row, :length].sum()
        assert_close(rewards[row].sum(), score[row] - 0.3 * log_ratio)


def test_a_forbidden_completion_is_minus_infinite_at_its_last_token_only():
    rewards = token_rewards(torch.tensor([-torch.inf] * 3), torch.zeros(3, 3), MASK, beta=0.5)
    assert rewards[0].tolist() == [0.0, 0.0, -torch.inf]
    assert rewards[1].tolist() == [-torch.inf, 0.0, 0.0]


def test_token_rewards_refusals():
    with pytest.raises(ValueError, match=r"`score` must be \(B,\) and `token_kl` \(B, T\), got \(2,\) and \(3, 3\)"):
        token_rewards(torch.zeros(2), torch.zeros(3, 3), MASK, 0.1)
    with pytest.raises(ValueError, match="right-padded"):
        token_rewards(torch.zeros(3), torch.zeros(3, 3), MASK.flip(-1), 0.1)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target
        (6.6, 0.15 * (1 + 0.1 * 0.064)),  # 10 % above
        (5.4, 0.15 * (1 - 0.1 * 0.064)),
        (60.0, 0.15 * (1 + 0.2 * 0.064)),  # clipped at 20 %
        (-1.0, 0.15 * (1 - 0.2 * 0.064)),  # an estimate may be negative
    ],
)
def test_adapted_beta_by_hand(kl, expected):
    # the batch and horizon of Ziegler et al.: 640 of 10,000 episodes
    assert adapted_beta(0.15, kl, target_kl=6.0, episodes=640, horizon=10_000) == pytest.approx(expected, rel=1e-12)


def test_adapted_beta_settles_where_the_kl_is_the_target():
    # a policy at the optimum of a Gaussian bandit: KL(β) = 1/(2β²), 2 nats at β = 0.5
    beta = 0.05
    for _ in range(200):
        beta = adapted_beta(beta, 1 / (2 * beta**2), target_kl=2.0, episodes=50, horizon=100)
    assert beta == pytest.approx(0.5, rel=1e-3)


def test_tokens_of_an_environment_are_skipped():
    """As if the completions were without them, with values that know of them; λ < 1 counts own tokens only."""
    generator = torch.Generator().manual_seed(0)
    log_ratios, values = torch.randn(2, 2, 5, generator=generator).unbind(0)
    mask = torch.tensor([[True, False, False, True, True], [True, True, False, False, False]])
    score = torch.tensor([3.0, -1.0])
    beside = torch.where(mask, log_ratios, torch.nan)
    advantages, targets = kl_penalised_advantages(score, beside, torch.where(mask, values, torch.nan), mask, 0.5, 0.7)
    for row in range(2):
        cut = [column[row : row + 1, mask[row]] for column in (log_ratios, values, mask)]
        expected = kl_penalised_advantages(score[row : row + 1], *cut, 0.5, 0.7)
        for ours, plain in zip((advantages, targets), expected, strict=True):
            assert_close(ours[row, mask[row]], plain[0])
            assert not ours[row, ~mask[row]].any()


def test_advantages_by_hand():
    log_ratios = torch.tensor([[0.2, -0.5, 0.1], [0.4, torch.nan, torch.nan]])
    values = torch.tensor([[1.0, 0.5, 2.0], [0.3, torch.nan, torch.nan]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages, targets = kl_penalised_advantages(torch.tensor([3.0, -1.0]), log_ratios, values, mask, 0.5, lam=0.9)
    returns = [3.0 - 0.5 * (0.2 - 0.5 + 0.1), -1.0 - 0.5 * 0.4]
    # with the KL already paid in the value, each TD error is a step of u, and the last one ends at the whole return
    last = returns[0] - 2.0
    middle = (2.0 - 0.5) + 0.9 * last
    first = (0.5 - 1.0) + 0.9 * middle
    assert_close(advantages, torch.tensor([[first, middle, last], [returns[1] - 0.3, 0.0, 0.0]]))
    assert_close(targets, torch.tensor([[returns[0]] * 3, [returns[1], 0.0, 0.0]]))


def test_advantages_are_those_of_gae_with_the_usual_value(toy):
    generator = torch.Generator().manual_seed(0)
    log_ratios, u = torch.randn(2, 5, 4, generator=generator)
    score = torch.randn(5, generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 2, 1, 3, 4])[:, None]
    advantages, _ = kl_penalised_advantages(score, log_ratios, u, mask, 0.3, lam=1.0)
    for row in range(5):
        length = int(mask[row].sum())
        for t in range(length):
            to_go = score[row] - 0.3 * log_ratios[row, t:length].sum()  # log-ratios from t on, t included
            usual_value = u[row, t] + 0.3 * log_ratios[row, :t].sum()
            assert_close(advantages[row, t], to_go - usual_value)


def test_at_the_posterior_an_exact_critic_leaves_no_advantage(toy):
    """With π = π*, r − β·log(π*/π0) is β·log Z for every completion."""
    scores = toy.rewards[1]  # (N,)
    log_ratio = (toy.log_posterior() - toy.log_prior)[1]  # (N,), of whole completions
    shares = torch.tensor([0.2, 0.5, 0.3])  # however it falls on the tokens
    log_ratios = log_ratio[:, None] * shares
    values = torch.full_like(log_ratios, toy.beta * toy.log_z()[1].item())
    mask = torch.ones_like(log_ratios, dtype=torch.bool)
    advantages, targets = kl_penalised_advantages(scores, log_ratios, values, mask, toy.beta, lam=0.95)
    assert advantages.abs().max() < 1e-5
    assert_close(targets, values, rtol=1e-5, atol=1e-5)


def test_one_completion_a_prompt_has_the_critic_alone():
    forecasts = torch.tensor([0.5, -2.0])
    assert torch.equal(prompt_baseline(torch.tensor([9.0, 9.0]), forecasts, 1), forecasts)


def test_a_critic_that_knows_nothing_leaves_the_siblings():
    returns = torch.tensor([10.0, 11.0, 12.0, 50.0, 52.0, 51.0])
    baseline = prompt_baseline(returns, torch.zeros(6), 3)
    assert_close(baseline, torch.tensor([11.5, 11.0, 10.5, 51.5, 50.5, 51.0]), rtol=2e-3, atol=0.0)


def test_an_exact_critic_beats_noisy_siblings():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(200, generator=generator).repeat_interleave(2)
    returns = means + 3 * torch.randn(400, generator=generator)
    baseline = prompt_baseline(returns, means, 2)
    siblings = returns.view(-1, 2).flip(-1).flatten()
    assert (baseline - means).square().mean() < 0.2 * (siblings - means).square().mean()


def test_the_baseline_is_better_than_either_of_its_parts():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(500, generator=generator).repeat_interleave(4)
    returns = means + 2 * torch.randn(2000, generator=generator)
    forecasts = means + 0.8 * torch.randn(500, generator=generator).repeat_interleave(4)
    groups = returns.view(-1, 4)
    siblings = ((groups.sum(-1, keepdim=True) - groups) / 3).flatten()

    def error(baseline):
        return (baseline - means).square().mean()

    baseline = prompt_baseline(returns, forecasts, 4)
    # two independent errors of variance 0.64 and 4/3, weighed by their inverses
    assert_close(error(baseline), torch.tensor(1 / (1 / 0.64 + 3 / 4)), rtol=0.15, atol=0.0)
    assert error(baseline) < 0.8 * min(error(siblings), error(forecasts))


def test_the_baseline_does_not_depend_on_a_completions_own_return():
    generator = torch.Generator().manual_seed(0)
    returns = torch.randn(1000, generator=generator).repeat_interleave(4) + torch.randn(4000, generator=generator)
    other = returns.clone()
    other[0] += 5.0
    forecasts = torch.full((4000,), 0.3)
    changed = (prompt_baseline(other, forecasts, 4) - prompt_baseline(returns, forecasts, 4)).abs()
    # only through the weight, which 4,000 completions share; its siblings' baselines move by more
    assert changed[0] < 0.01 * changed[1:4].min()


def test_completions_without_return_are_left_out_of_the_baseline():
    returns = torch.tensor([10.0, torch.nan, 12.0, 50.0, torch.nan, torch.nan])
    forecasts = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    baseline = prompt_baseline(returns, forecasts, 3)
    assert_close(baseline[[1, 3, 4, 5]], forecasts[[1, 3, 4, 5]])
    assert_close(baseline[[0, 2]], torch.tensor([12.0, 10.0]), rtol=0.1, atol=0.0)
    nothing = prompt_baseline(torch.full((4,), torch.nan), torch.arange(4.0), 2)
    assert_close(nothing, torch.arange(4.0))
