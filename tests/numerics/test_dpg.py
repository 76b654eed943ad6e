import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics import f_divergence
from rlhf_bayes.numerics.dpg import default_baseline, dpg_advantages, dpg_baselines
from rlhf_bayes.numerics.f_divergence import divergence_cases, divergence_of
from rlhf_bayes.numerics.groups import leave_one_out_baseline

CASES = divergence_cases()
# four completions: a target, a policy and a proposal without symmetry
TARGET = torch.tensor([0.45, 0.3, 0.05, 0.2], dtype=torch.float64).log()
LOGITS = torch.tensor([0.3, -0.8, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
PROPOSAL = torch.tensor([0.1, 0.35, 0.25, 0.3], dtype=torch.float64).log()
CONDITIONED = torch.tensor([0.6, 0.0, 0.1, 0.3], dtype=torch.float64).log()


def advantages_of(log_target, log_policy, log_proposal, groups, divergence, alpha=None, baseline="leave_one_out"):
    log_probs = (log_target, log_policy, log_proposal)
    baselines = dpg_baselines(*log_probs, groups, divergence, alpha, baseline)
    return dpg_advantages(*log_probs, baselines, divergence, alpha).advantages


def gradients(tuples, log_target, log_proposal, divergence, alpha, baseline):
    """The estimate of each group of draws, (G, N), as the trainer would form it; tuples (G, n) of completions."""
    log_policy = LOGITS.detach().log_softmax(-1)
    scores = torch.eye(len(LOGITS), dtype=torch.float64) - log_policy.exp()  # (N, N): ∇ log π(x)
    drawn = tuples.flatten()
    groups = torch.arange(len(tuples)).repeat_interleave(tuples.size(1))
    advantages = advantages_of(
        log_target[drawn], log_policy[drawn], log_proposal[drawn], groups, divergence, alpha, baseline
    )
    return -(advantages[:, None] * scores[drawn]).view(*tuples.shape, -1).mean(1)


def exact_gradient(log_target, divergence, alpha):
    return torch.autograd.grad(f_divergence(log_target, LOGITS.log_softmax(-1), divergence, alpha), LOGITS)[0]


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
@pytest.mark.parametrize("baseline", ["leave_one_out", "constant", "none"])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("forbid", [False, True])
def test_unbiased_by_enumeration_of_every_group_of_draws(divergence, alpha, baseline, on_policy, forbid):
    if forbid and divergence_of(divergence, alpha).infinite_where_forbidden:
        pytest.skip("it refuses forbidden completions: test_f_divergence.py")
    log_target = CONDITIONED if forbid else TARGET
    log_proposal = LOGITS.detach().log_softmax(-1) if on_policy else PROPOSAL
    tuples = torch.tensor(list(itertools.product(range(4), repeat=3)))  # (64, 3)
    estimates = gradients(tuples, log_target, log_proposal, divergence, alpha, baseline)
    expectation = (log_proposal[tuples].sum(-1).exp()[:, None] * estimates).sum(0)
    assert_close(expectation, exact_gradient(log_target, divergence, alpha), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
def test_unbiased_within_standard_errors_on_the_toy(toy, divergence, alpha):
    log_target, log_proposal = toy.log_posterior()[1].double(), toy.log_prior[1].double().log_softmax(-1)
    log_policy = toy.log_probs(toy.random_policy(noise=0.2, seed=4))[1].detach().double().log_softmax(-1)
    direction = torch.randn(len(log_policy), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = direction - (log_policy.exp() * direction).sum()  # (N,): of log π(x) along the direction
    n_groups, n = 20_000, 4
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(log_proposal.exp(), n_groups * n, replacement=True, generator=generator)
    groups = torch.arange(n_groups).repeat_interleave(n)
    advantages = advantages_of(log_target[drawn], log_policy[drawn], log_proposal[drawn], groups, divergence, alpha)
    estimates = -(advantages * slopes[drawn]).view(n_groups, n).mean(-1)
    logits = log_policy.clone().requires_grad_()
    exact = torch.autograd.grad(f_divergence(log_target, logits.log_softmax(-1), divergence, alpha), logits)[0]
    se = estimates.std() / math.sqrt(n_groups)
    error = (estimates.mean() - exact @ direction).item()
    assert abs(error) < 5 * se, f"off by {error / se:.1f} standard errors"


def test_a_baseline_without_the_ratio_would_be_biased():
    """Why the baseline is multiplied by π/q: what every enumeration above would miss if it were not."""
    log_policy = LOGITS.detach().log_softmax(-1)
    scores = torch.eye(4, dtype=torch.float64) - log_policy.exp()
    assert_close(log_policy.exp() @ scores, torch.zeros(4, dtype=torch.float64))
    assert (PROPOSAL.exp() @ scores).abs().max() > 0.1


def test_constant_baseline_is_the_z_of_korbak():
    """P/q − Z·π/q, over Z, from unnormalised weights."""
    log_density, log_z = TARGET + 1.7, 1.7
    log_policy = LOGITS.detach().log_softmax(-1)
    expected = ((log_density - PROPOSAL).exp() - math.exp(log_z) * (log_policy - PROPOSAL).exp()) / math.exp(log_z)
    groups = torch.arange(4)
    by_constant = advantages_of(TARGET, log_policy, PROPOSAL, groups, "forward_kl", baseline="constant")
    assert_close(by_constant, expected.float())


def test_ratios_beyond_single_precision_multiply_to_what_they_are():
    """The policy has left a completion that the target and an old proposal share: p/π = e¹⁰⁰, π/q = e⁻¹⁰⁰."""
    log_target, log_policy = torch.tensor([-100.0, -1.0]), torch.tensor([-200.0, -1.0])
    log_proposal = torch.tensor([-100.0, -1.0])
    by_constant = advantages_of(log_target, log_policy, log_proposal, torch.arange(2), "forward_kl", None, "constant")
    assert_close(by_constant, torch.tensor([1.0, 0.0]))
    # b = 1 + (1 − e⁻¹⁰⁰) / 1 for the second, not the e¹⁰⁰ of its one sibling
    by_sibling = advantages_of(log_target, log_policy, log_proposal, torch.tensor([0, 0]), "forward_kl")
    assert_close(by_sibling, torch.tensor([1.0, -1.0]))


def test_leave_one_out_baseline_by_hand():
    rewards = torch.tensor([1.0, 10.0, 2.0, 6.0, 20.0, 7.0])
    groups = torch.tensor([5, 3, 5, 5, 3, 8])
    assert_close(leave_one_out_baseline(rewards, groups), torch.tensor([4.0, 20.0, 3.5, 1.5, 10.0, 0.0]))
    log_ratio = torch.tensor([1.0, 1.0, 3.0, 4.0, 5.0, 1.0]).log()
    # of groups 5 and 3; the last has no sibling
    weighted = torch.tensor([30 / 7, 20.0, 25 / 5, 7 / 4, 10.0, 0.0])
    assert_close(leave_one_out_baseline(rewards, groups, log_ratio), weighted)


def test_weight_that_the_siblings_lack_counts_as_the_default():
    rewards, groups = torch.tensor([1.0, 10.0, 2.0]), torch.zeros(3, dtype=torch.long)
    log_ratio = torch.tensor([0.5, 0.25, 0.5]).log()
    # two siblings with weights 0.25 and 0.5: 1.25 of 2 is missing
    expected = (0.25 * 10 + 0.5 * 2 + 1.25 * 4) / 2
    assert_close(leave_one_out_baseline(rewards, groups, log_ratio, 4.0)[0], torch.tensor(expected))
    assert_close(leave_one_out_baseline(rewards, groups, log_ratio - 500, 4.0), torch.full((3,), 4.0))
    assert_close(leave_one_out_baseline(rewards[:1], groups[:1], None, 4.0), torch.tensor([4.0]))


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
def test_no_advantage_once_the_policy_is_the_target(divergence, alpha):
    drawn = torch.tensor([0, 1, 3, 3])
    for baseline in ("leave_one_out", "constant"):
        advantages = advantages_of(
            TARGET[drawn],
            TARGET[drawn],
            PROPOSAL[drawn],
            torch.zeros(4, dtype=torch.long),
            divergence,
            alpha,
            baseline,
        )
        assert_close(advantages, torch.zeros(4))


def test_completions_left_out_have_no_part_in_the_baseline():
    rewards = torch.tensor([1.0, torch.nan, 3.0, torch.nan, 4.0])
    groups = torch.tensor([0, 0, 0, 1, 1])
    assert_close(leave_one_out_baseline(rewards, groups), torch.tensor([3.0, 2.0, 1.0, 4.0, 0.0]))


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
def test_completions_left_out_have_no_part_in_the_advantages(divergence, alpha):
    log_target, others = torch.tensor([-1.0, torch.nan, -3.0, -2.5]), torch.full((4,), -2.0)
    groups, kept = torch.zeros(4, dtype=torch.long), torch.tensor([0, 2, 3])
    with_it = advantages_of(log_target, others, others, groups, divergence, alpha)
    without = advantages_of(log_target[kept], others[kept], others[kept], groups[kept], divergence, alpha)
    assert_close(with_it[kept], without)
    assert with_it[1] == 0
    assert without.abs().min() > 0


def test_an_outlier_leaves_its_siblings_mean_exact():
    rewards = torch.tensor([1.0, math.exp(45), 3.0], dtype=torch.float64)
    baseline = leave_one_out_baseline(rewards, torch.zeros(3, dtype=torch.long))
    assert baseline[1] == 2.0


def test_the_default_baseline_is_that_of_the_record_where_there_are_siblings():
    expected = {"reverse_kl": "leave_one_out", "tv": "leave_one_out", "forward_kl": "constant"}
    assert {name: default_baseline(name, None, 2) for name in expected} == expected
    assert default_baseline("alpha", 1.0, 2) == "constant"
    assert {default_baseline(*case, 1) for case in CASES} == {"constant"}
    with pytest.raises(ValueError, match="`divergence` must be one of"):
        default_baseline("kl", None, 1)


def test_refusals():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="`baseline` must be one of leave_one_out, constant, none, got 'mean'"):
        advantages_of(two, two, two, two.long(), "js", baseline="mean")
    with pytest.raises(ValueError, match="at least two completions"):
        advantages_of(one, one, one, one.long(), "js")
    with pytest.raises(ValueError, match=r"`log_proposal` must be finite .* with 1 that"):
        dpg_advantages(two, two, torch.tensor([0.0, -torch.inf]), two, "js")
    with pytest.raises(ValueError, match="`groups` must be integers"):
        leave_one_out_baseline(two, two)
    with pytest.raises(ValueError, match="same shape"):
        leave_one_out_baseline(two, one.long())


def test_a_baseline_of_another_policy_keeps_the_gradient_unbiased():
    """As in the second pass over a rollout: the baseline is that of the policy which drew it."""
    log_policy, old = LOGITS.detach().log_softmax(-1), torch.tensor([0.2, 0.2, 0.5, 0.1], dtype=torch.float64).log()
    scores = torch.eye(4, dtype=torch.float64) - log_policy.exp()
    tuples = torch.tensor(list(itertools.product(range(4), repeat=3)))  # (64, 3)
    drawn, groups = tuples.flatten(), torch.arange(64).repeat_interleave(3)
    baselines = dpg_baselines(TARGET[drawn], old[drawn], old[drawn], groups, "reverse_kl", None, "leave_one_out")
    advantages = dpg_advantages(TARGET[drawn], log_policy[drawn], old[drawn], baselines, "reverse_kl").advantages
    estimates = -(advantages[:, None] * scores[drawn]).view(64, 3, 4).mean(1)
    expectation = (old[tuples].sum(-1).exp()[:, None] * estimates).sum(0)
    assert_close(expectation, exact_gradient(TARGET, "reverse_kl", None), rtol=1e-6, atol=1e-7)


def test_what_the_clip_takes_is_counted():
    log_target, log_policy = torch.tensor([0.0, -1.0, -torch.inf]), torch.tensor([-3.0, -1.0, -2.0])
    log_proposal = torch.tensor([-3.5, -1.0, -2.0])
    ones = torch.ones(3)
    kept, clipped = dpg_advantages(log_target, log_policy, log_proposal, ones, "forward_kl", None, 5.0)
    ratio = math.exp(0.5)
    assert_close(kept, torch.tensor([ratio * 4.0, 0.0, -1.0]))
    assert_close(clipped, torch.tensor([ratio * (math.exp(3) - 5.0), 0.0, 0.0]))
    whole, none = dpg_advantages(log_target, log_policy, log_proposal, ones, "forward_kl")
    assert_close(whole, kept + clipped)
    assert none.abs().max() == 0
