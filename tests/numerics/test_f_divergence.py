import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics import DIVERGENCES, f_divergence, js, tv
from rlhf_bayes.numerics.dpg import BASELINES
from rlhf_bayes.numerics.f_divergence import (
    divergence_cases,
    divergence_of,
    f_divergence_terms,
    pseudo_rewards,
)

CASES = [*divergence_cases(), ("alpha", 0.2)]  # a new record is among them
INFINITE = [("reverse_kl", None), ("pearson", None), ("alpha", 1.0)]  # where something is forbidden
# values of each divergence by another route: add a name to all of these tables
GENERATORS = {
    "forward_kl": lambda t, alpha: -t.log(),
    "reverse_kl": lambda t, alpha: t * t.log(),
    "js": lambda t, alpha: 0.5 * (t * t.log() - (t + 1) * ((t + 1) / 2).log()),
    "tv": lambda t, alpha: 0.5 * (t - 1).abs(),
    "pearson": lambda t, alpha: (t - 1) ** 2,
    "renyi_2": lambda t, alpha: (t - 1) ** 2 / t,
    "alpha": lambda t, alpha: (t**alpha - alpha * t + alpha - 1) / (alpha * (alpha - 1)),
}


# of a policy and a target without common support
DISJOINT = {
    "forward_kl": math.inf,
    "reverse_kl": math.inf,
    "js": math.log(2),
    "tv": 1.0,
    "pearson": math.inf,
    "renyi_2": math.inf,
    "alpha": 4.0,
}
# pseudo-reward of a forbidden completion
FORBIDDEN = {"forward_kl": 0.0, "js": -0.5 * math.log(2), "tv": -0.5, "renyi_2": -1.0, "alpha": -2.0}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_has_values_here(name):
    """By name: a record without them has not been checked by another route."""
    assert name in GENERATORS
    assert name in DISJOINT
    case = dict(divergence_cases())[name]
    assert (name in FORBIDDEN) != ((name, case) in INFINITE)


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
def test_a_record_is_whole(divergence, alpha):
    assert len(DIVERGENCES[divergence].help) > 10
    assert not DIVERGENCES[divergence].help.endswith(".")
    assert divergence_of(divergence, alpha).baseline in BASELINES


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
def test_what_the_mean_of_the_terms_rests_on_is_convex_and_0_at_1(divergence, alpha):
    """f(t) = t·(p/π)·f(π/p) at π/p = t, from the terms that the record has."""
    t = torch.linspace(0.02, 6.0, 300, dtype=torch.float64)
    f = t * f_divergence_terms(-t.log(), divergence, alpha)
    assert (f[2:] - 2 * f[1:-1] + f[:-2] >= -1e-12).all()
    assert f.max() > 0.1
    assert f_divergence_terms(torch.zeros(1, dtype=torch.float64), divergence, alpha).item() == 0
    generator = GENERATORS[divergence](t, alpha)
    tilt = (f - generator)[1:].diff() / t[1:].diff()  # f and the generator differ by a multiple of t − 1 only
    assert_close(tilt, tilt[0].expand_as(tilt), rtol=1e-6, atol=1e-6)
    assert GENERATORS[divergence](torch.ones(1), alpha).abs().item() < 1e-7


@pytest.fixture(scope="module")
def logits(toy):
    """Of a policy that is neither the prior nor the posterior, in fp64: (N,), leaf."""
    return toy.log_probs(toy.random_policy(noise=0.3, seed=4))[1].detach().double().requires_grad_()


@pytest.fixture(scope="module")
def log_target(toy):
    return toy.log_posterior()[1].double().log_softmax(-1)


def conditioned(log_target):
    """A third of the completions forbidden."""
    kept = torch.arange(len(log_target)) % 3 != 0
    return torch.where(kept, log_target, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize(("divergence", "alpha"), [*CASES, ("alpha", 0.9)])
def test_pseudo_reward_is_the_negative_derivative_of_the_generator(divergence, alpha):
    t = torch.linspace(0.05, 4.0, 20, dtype=torch.float64, requires_grad=True)
    derivative = torch.autograd.grad(GENERATORS[divergence](t, alpha).sum(), t)[0]
    assert_close(pseudo_rewards(-t.detach().log(), divergence, alpha), -derivative)


@pytest.mark.parametrize(("divergence", "alpha"), [*CASES, ("alpha", 0.9)])
def test_divergence_is_the_expectation_of_the_generator(logits, log_target, divergence, alpha):
    log_q = logits.detach().log_softmax(-1)
    expected = (log_target.exp() * GENERATORS[divergence]((log_q - log_target).exp(), alpha)).sum()
    assert_close(f_divergence(log_target, log_q, divergence, alpha), expected)


@pytest.mark.parametrize(("divergence", "alpha"), [*CASES, ("alpha", 0.0), ("alpha", 0.8), ("alpha", 1.0)])
@pytest.mark.parametrize("forbid", [False, True])
def test_expected_policy_gradient_is_the_exact_gradient(logits, log_target, divergence, alpha, forbid):
    if forbid and (divergence, alpha) in INFINITE:
        pytest.skip("infinite with forbidden completions: refused, as another test says")
    log_target = conditioned(log_target) if forbid else log_target
    log_policy = logits.log_softmax(-1)
    exact = torch.autograd.grad(f_divergence(log_target, log_policy, divergence, alpha), logits, retain_graph=True)[0]
    rewards = pseudo_rewards(log_target - log_policy.detach(), divergence, alpha)
    surrogate = -(log_policy.detach().exp() * rewards * log_policy).sum()
    assert_close(torch.autograd.grad(surrogate, logits)[0], exact)
    assert exact.norm() > 1e-3


@pytest.mark.parametrize(("divergence", "alpha"), [case for case in CASES if case not in INFINITE])
def test_a_forbidden_completion_has_the_limit_of_ever_smaller_targets(divergence, alpha):
    limit = -1 / (1 - alpha) if divergence == "alpha" else FORBIDDEN[divergence]
    ratios = torch.tensor([-torch.inf, -400.0], dtype=torch.float64)
    assert_close(pseudo_rewards(ratios, divergence, alpha), torch.full_like(ratios, limit))


@pytest.mark.parametrize(("divergence", "alpha"), INFINITE)
def test_what_is_infinite_there_refuses_a_forbidden_completion(divergence, alpha):
    assert divergence_of(divergence, alpha).infinite_where_forbidden
    with pytest.raises(ValueError, match=r"infinite for a policy that can draw a forbidden completion, and 2 of 3"):
        pseudo_rewards(torch.tensor([-torch.inf, 0.5, -torch.inf]), divergence, alpha)


@pytest.mark.parametrize(("end", "name", "constant"), [(0.0, "forward_kl", -1.0), (1.0, "reverse_kl", 1.0)])
def test_alpha_ends_in_the_two_kls(logits, log_target, end, name, constant):
    near = abs(end - 1e-7)
    ratios = torch.linspace(-6, 6, 13, dtype=torch.float64)
    expected = pseudo_rewards(ratios, name) + constant
    assert_close(pseudo_rewards(ratios, "alpha", end), expected)
    assert_close(pseudo_rewards(ratios, "alpha", near), expected, rtol=1e-5, atol=1e-5)
    log_q = logits.detach().log_softmax(-1)
    exact = f_divergence(log_target, log_q, name)
    assert_close(f_divergence(log_target, log_q, "alpha", end), exact)
    assert_close(f_divergence(log_target, log_q, "alpha", near), exact, rtol=1e-5, atol=0)
    # single precision too, where 1 − Σ q^α p^(1−α) would be all rounding
    assert_close(f_divergence(log_target.float(), log_q.float(), "alpha", near), exact.float(), rtol=1e-3, atol=0)


def test_js_and_tv_are_those_of_the_package(logits, log_target):
    log_q = logits.detach().log_softmax(-1)
    assert f_divergence(log_target, log_q, "js") == js(log_target, log_q)
    assert f_divergence(log_target, log_q, "tv") == tv(log_target, log_q)


@pytest.mark.parametrize("forbid", [False, True])
def test_renyis_divergence_of_order_2_is_a_function_of_its_record(logits, log_target, forbid):
    """By its definition, log Σ p²/π, which has the same direction: the gradients differ by the factor exp(R₂)."""
    target = conditioned(log_target) if forbid else log_target
    log_policy = logits.log_softmax(-1)
    renyi = (2 * target - log_policy).logsumexp(-1)
    value = f_divergence(target, log_policy, "renyi_2")
    assert_close(value.log1p(), renyi)
    (of_renyi,) = torch.autograd.grad(renyi, logits, retain_graph=True)
    assert_close(torch.autograd.grad(value, logits)[0], renyi.exp() * of_renyi)


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
def test_divergence_at_equality_and_without_common_support(log_target, divergence, alpha):
    assert_close(f_divergence(log_target, log_target, divergence, alpha).abs().item(), 0.0)
    left, right = torch.tensor([1.0, 0.0, 0.0]).log(), torch.tensor([0.0, 0.5, 0.5]).log()
    value = f_divergence(left, right, divergence, alpha)
    expected = 1 / (alpha * (1 - alpha)) if divergence == "alpha" else DISJOINT[divergence]
    assert_close(value.item(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_alpha_has_a_finite_gradient_where_either_is_zero(alpha):
    logits = torch.tensor([0.5, -1.0, -torch.inf, 0.3], dtype=torch.float64, requires_grad=True)
    log_p = torch.tensor([0.6, 0.0, 0.1, 0.3], dtype=torch.float64).log()
    f_divergence(log_p, logits.log_softmax(-1), "alpha", alpha).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
def test_left_out_completions_stay_nan(divergence, alpha):
    assert pseudo_rewards(torch.tensor([0.5, torch.nan]), divergence, alpha).isnan().tolist() == [False, True]


def test_halves_become_singles():
    assert pseudo_rewards(torch.tensor([0.5], dtype=torch.bfloat16), "forward_kl").dtype == torch.float32


def test_refusals():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=f"must be one of {', '.join(DIVERGENCES)}, got 'kl'"):
        pseudo_rewards(one, "kl")
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\] .*, got None"):
        pseudo_rewards(one, "alpha")
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\] .*, got 1\.5"):
        f_divergence(one, one, "alpha", 1.5)
    with pytest.raises(ValueError, match="`alpha` belongs to"):
        pseudo_rewards(one, "js", 0.5)
    with pytest.raises(ValueError, match=r"got \+inf"):
        pseudo_rewards(one + torch.inf, "forward_kl")
    with pytest.raises(ValueError, match="same shape"):
        f_divergence(torch.zeros(1), torch.zeros(2), "alpha", 0.5)
    with pytest.raises(ValueError, match="must be normalised"):
        f_divergence(one + 1, one, "alpha", 0.5)


@pytest.mark.parametrize(("divergence", "alpha"), [*CASES, ("alpha", 0.0), ("alpha", 1.0)])
@pytest.mark.parametrize("forbid", [False, True])
def test_the_terms_of_a_divergence_have_it_as_their_mean(logits, log_target, divergence, alpha, forbid):
    log_policy = logits.detach().log_softmax(-1)
    target = conditioned(log_target) if forbid else log_target
    terms = f_divergence_terms(target - log_policy, divergence, alpha)
    assert (terms >= 0).all()
    exact = f_divergence(target, log_policy, divergence, alpha)
    mean = (log_policy.exp() * terms).sum()
    assert mean == exact == torch.inf if forbid and (divergence, alpha) in INFINITE else mean.isfinite()
    assert_close(mean, exact)


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
def test_a_term_left_out_stays_so(divergence, alpha):
    terms = f_divergence_terms(torch.tensor([torch.nan, 0.0]), divergence, alpha)
    assert terms[0].isnan()
    assert terms[1] == 0


@pytest.mark.parametrize(("end", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9, 1e-12])
def test_terms_of_alpha_end_in_those_of_the_two_kls(end, name, distance):
    """In single precision too, as evaluations have them."""
    ratios = torch.tensor([-5.0, -0.3, 0.0, 0.2, 4.0])
    terms = f_divergence_terms(ratios, "alpha", abs(end - distance))
    assert_close(terms, f_divergence_terms(ratios, name), rtol=5 * distance + 1e-5, atol=1e-6)
    assert f_divergence_terms(torch.tensor([-torch.inf]), "alpha", 0.3).item() == pytest.approx(1 / 0.7)


@pytest.mark.parametrize(("divergence", "alpha"), CASES)
def test_terms_of_huge_ratios_are_the_generator(divergence, alpha):
    """p/π = e^±200, by 60 decimal digits."""
    generators = {
        "forward_kl": lambda t: -t.ln() + t - 1,
        "reverse_kl": lambda t: t * t.ln() - t + 1,
        "js": lambda t: (t * t.ln() - (t + 1) * ((t + 1) / 2).ln()) / 2,
        "tv": lambda t: abs(t - 1) / 2,
        "pearson": lambda t: (t - 1) ** 2,
        "renyi_2": lambda t: (t - 1) ** 2 / t,
        "alpha": lambda t: (t ** Decimal(alpha) - Decimal(alpha) * (t - 1) - 1) / Decimal(alpha * (alpha - 1)),
    }
    for s in (-200, 200):
        with localcontext() as context:
            context.prec = 60
            ratio = Decimal(s).exp()
            expected = float(ratio * generators[divergence](1 / ratio))
        terms = f_divergence_terms(torch.tensor([float(s)], dtype=torch.float64), divergence, alpha)
        assert terms.item() == pytest.approx(expected, rel=1e-9)
