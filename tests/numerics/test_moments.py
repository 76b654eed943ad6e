"""λ of given moments against roots of the exact moment equations, and errors that say what cannot be."""

import math

import pytest
import torch
from scipy.optimize import root
from torch.testing import assert_close

from rlhf_bayes.numerics import fit_moments


def family(seed=0, num_groups=3, n=40):
    """An enumerated π0 (P, N) and features (P, N, 3): two that are binary and depend, one that is not."""
    generator = torch.Generator().manual_seed(seed)
    log_prior = torch.randn(num_groups, n, generator=generator, dtype=torch.float64).log_softmax(-1)
    u = torch.rand(num_groups, n, 3, generator=generator, dtype=torch.float64)
    first = (u[..., 0] < 0.3).double()
    second = (u[..., 1] < 0.2 + 0.5 * first).double()
    return log_prior, torch.stack([first, second, 2 + 3 * u[..., 2] - first], -1)


def exact_moments(log_prior, features, lambdas):
    log_density = log_prior + features @ torch.as_tensor(lambdas, dtype=torch.float64)
    p = log_density.softmax(-1)
    return (p[..., None] * features).sum(1).mean(0), log_density.logsumexp(-1), p


def exact_lambdas(log_prior, features, moments):
    def gap(lambdas):
        return (exact_moments(log_prior, features, lambdas)[0] - moments).numpy()

    solution = root(gap, torch.zeros(len(moments)).numpy(), tol=1e-10)
    assert solution.success
    return torch.tensor(solution.x)


MOMENTS = torch.tensor([0.55, 0.25, 3.9], dtype=torch.float64)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_is_the_root_of_the_exact_moment_equations(num_groups):
    log_prior, features = family(num_groups=num_groups)
    expected = exact_lambdas(log_prior, features, MOMENTS)
    assert expected.abs().min() > 0.2
    # all of the support, weighted by π0/q for the uniform q: nothing is left to chance
    weights = log_prior + math.log(features.size(1))
    fit = fit_moments(features, MOMENTS, weights)
    assert_close(fit.lambdas, expected, rtol=0, atol=1e-7)
    assert_close(fit.moments, MOMENTS, rtol=0, atol=1e-9)
    _, log_z, p = exact_moments(log_prior, features, expected)
    assert_close(fit.log_z, log_z, rtol=0, atol=1e-6)
    assert fit.mean_log_z == pytest.approx(float(log_z.mean()))
    kl = (p * (p.log() - log_prior)).sum(-1).mean()  # by its definition
    assert fit.kl == pytest.approx(float(kl), abs=1e-7)
    assert_close(fit.prior_moments, (log_prior.exp()[..., None] * features).sum(1).mean(0))
    if num_groups == 1:
        assert_close(fit_moments(features[0], MOMENTS, weights[0]).lambdas, fit.lambdas)


def test_no_other_distribution_with_these_moments_is_closer():
    log_prior, features = family(seed=2)
    fit = fit_moments(features, MOMENTS, log_prior + math.log(features.size(1)))
    p = (log_prior + features @ fit.lambdas).softmax(-1)
    # move within the distributions of the same moments: directions that change no sum and no moment
    rows = torch.cat([torch.block_diag(*torch.ones(3, 1, p.size(1), dtype=torch.float64)), features.flatten(0, 1).T])
    _, _, right = torch.linalg.svd(rows)
    for direction in right[len(rows) :][:20]:
        step = 1e-3 * direction.view_as(p) * p.min() / direction.abs().max()
        for moved in (p + 900 * step, p - 900 * step):
            assert (moved * (moved.log() - log_prior)).sum(-1).mean() > fit.kl


@pytest.mark.parametrize("proposal", ["prior", "other"])
def test_standard_errors_are_those_of_repeated_draws(proposal):
    log_prior, features = family(seed=1, num_groups=2)
    n, repetitions = 4000, 100
    expected = exact_lambdas(log_prior, features, MOMENTS)
    _, log_z, p = exact_moments(log_prior, features, expected)
    truth = [*expected.tolist(), float(log_z.mean()), float((p * (p.log() - log_prior)).sum(-1).mean())]
    log_q = log_prior if proposal == "prior" else (0.5 * log_prior + features @ (0.7 * expected)).log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(repetitions):
        drawn = torch.multinomial(log_q.exp(), n, replacement=True, generator=generator)  # (P, n)
        rows = features.gather(1, drawn[..., None].expand(-1, -1, 3))
        fit = fit_moments(rows, MOMENTS, (log_prior - log_q).gather(1, drawn))
        reached = exact_moments(log_prior, features, fit.lambdas)[0]
        estimates = [*fit.lambdas.tolist(), fit.mean_log_z, fit.kl, *reached.tolist()]
        ses = [*fit.standard_errors.tolist(), fit.log_z_standard_error, fit.kl_standard_error]
        ses += fit.moment_standard_errors.tolist()
        errors.append([(a - b) / se for a, b, se in zip(estimates, [*truth, *MOMENTS.tolist()], ses, strict=True)])
    z = torch.tensor(errors)  # (R, 8)
    # the variance of a variance over R draws is 2/R, with room for the bias of order 1/n
    assert (z.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / repetitions), z.square().mean(0)
    assert z.mean(0).abs().max() < 0.5


def test_forbidden_draws_do_not_count():
    log_prior, features = family()
    weights = log_prior.masked_fill(features[..., 1] == 0, -math.inf)
    fit = fit_moments(features[..., :1], MOMENTS[:1], weights)
    kept = exact_lambdas(weights.log_softmax(-1), features[..., :1], MOMENTS[:1])
    assert_close(fit.lambdas, kept, rtol=0, atol=1e-7)


def test_without_features_it_is_the_normaliser():
    weights = torch.tensor([[0.0, -math.inf, 0.0, 0.0], [0.0, -math.inf, -math.inf, -math.inf]])
    fit = fit_moments(torch.zeros(2, 4, 0), torch.zeros(0), weights)
    assert fit.log_z.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    assert fit.kl == pytest.approx(-math.log(0.75 * 0.25) / 2)
    assert fit.importance_ess.tolist() == pytest.approx([3.0, 1.0])


def test_a_rare_feature_is_found_and_its_error_is_large():
    features = torch.zeros(1000, 1)
    features[0] = 1.0
    fit = fit_moments(features, torch.tensor([0.5]))
    assert fit.lambdas.item() == pytest.approx(math.log(999))
    assert fit.standard_errors.item() > 0.9
    assert fit.importance_ess.item() < 4.1


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (
            [1.2, 0.5],
            r"'a' must be inside .* between 0 and 1 \(200 draws, mean over 2 prompts\), got 1.2\. Ask.*`num_s",
        ),
        ([0.0, 0.5], "'a' must be inside .* got 0, on the edge, where λ is infinite"),
        (
            [0.2, 0.3],
            "contradict each other .* with 'b' = 0.3, the moment of 'a' can only be between 0.3 and 1 .* 0.2",
        ),
        ([0.3, 0.3], "contradict each other"),
    ],
)
def test_what_the_draws_do_not_reach(moments, message):
    a = torch.arange(200).view(2, 100) % 2
    b = a * (torch.arange(200).view(2, 100) % 4 == 1)  # b only where a
    with pytest.raises(ValueError, match=message):
        fit_moments(torch.stack([a, b], -1).float(), torch.tensor(moments), names=["a", "b"])


def test_moments_near_the_edge_are_still_found():
    a = torch.arange(200).view(2, 100) % 2
    b = a * (torch.arange(200).view(2, 100) % 4 == 1)
    moments = torch.tensor([0.3, 0.3 - 1e-5], dtype=torch.float64)
    fit = fit_moments(torch.stack([a, b], -1).double(), moments)
    assert_close(fit.moments, moments, rtol=0, atol=1e-8)


def test_three_that_cannot_be_together():
    # a, b, c exclude each other, and so cannot have more than 1 between them
    features = torch.eye(4)[torch.arange(400) % 4][:, :3]
    with pytest.raises(ValueError, match=r"contradict.*'a' can only be between 0 and 0.1 .* got 0.5"):
        fit_moments(features, torch.tensor([0.5, 0.4, 0.5]), names=["a", "b", "c"])
    lambdas = fit_moments(features, torch.tensor([0.5, 0.2, 0.2])).lambdas
    assert_close(lambdas, torch.tensor([5.0, 2.0, 2.0]).double().log(), rtol=0, atol=1e-5)


def test_features_that_follow_from_each_other():
    a = (torch.arange(100) % 3 == 0).double()
    pair = torch.stack([a, torch.arange(100) % 7, 1 - a], -1)
    with pytest.raises(ValueError, match=r"features 'a', 'c' must not follow from each other.*Leave one"):
        fit_moments(pair, torch.tensor([0.6, 3.0, 0.4], dtype=torch.float64), names=["a", "b", "c"])
    with pytest.raises(ValueError, match="contradict"):
        fit_moments(pair, torch.tensor([0.6, 3.0, 0.6]), names=["a", "b", "c"])


def test_what_is_the_same_for_all_completions_of_a_prompt_cannot_be_moved():
    features = torch.tensor([[1.0, 1.0], [0.0, 0.0]])[..., None]
    with pytest.raises(ValueError, match=r"'a' must vary among the draws of a prompt.* 0.5 on average.* to 0.7"):
        fit_moments(features, torch.tensor([0.7]), names=["a"])


@pytest.mark.parametrize(
    ("features", "moments", "weights", "message"),
    [
        (torch.zeros(3), torch.zeros(1), None, r"`features` must be \(N, F\).*got \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(1), None, r"`moments` must be \(F,\).*got \(1,\)"),
        (torch.zeros(3, 1), torch.zeros(1), torch.zeros(2), r"and \(2,\) with `features` \(3, 1\)"),
        (torch.full((3, 1), math.nan), torch.zeros(1), None, "`features` must be finite"),
        (torch.zeros(3, 1), torch.tensor([math.inf]), None, "`moments` must be finite"),
        (torch.zeros(3, 1), torch.zeros(1), torch.tensor([0, math.nan, 0]), "`log_weights` must be finite or -inf"),
        (torch.zeros(2, 3, 1), torch.zeros(1), torch.tensor([[0.0], [-math.inf]]).expand(2, 3), "group 1 has none"),
    ],
)
def test_arguments_out_of_range(features, moments, weights, message):
    with pytest.raises(ValueError, match=message):
        fit_moments(features, moments, weights)


def test_many_distinct_draws_take_no_linear_program():
    features = torch.randn(200, 250, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = fit_moments(features, torch.tensor([0.5, -1.0]))
    # of a standard normal, λ is the mean
    assert ((fit.lambdas - torch.tensor([0.5, -1.0])) / fit.standard_errors).abs().max() < 4
