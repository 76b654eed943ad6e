"""Given moments under a language model that is enumerated: λ, Z and KL exact; conditions; what is refused."""

import io
import math
import warnings

import pytest
import torch
from rich.console import Console
from scipy.optimize import root
from torch.testing import assert_close

from rlhf_bayes.likelihoods import Likelihood, MomentLikelihood
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.testing import check_posterior, toy_reward


def has_b(completions, **kwargs):
    return ["b" in str(completion) for completion in completions]


def has_a(completions, **kwargs):
    return ["a" in str(completion) for completion in completions]


def words(completion_ids, **kwargs):
    return [len(ids) for ids in completion_ids]


def no_c(completions, **kwargs):
    return [float("c" not in completion) for completion in completions]


def prior_of(toy, model=None):
    return LanguageModel(model or toy.model, toy.tokenizer, toy.max_completion_length, batch_size=2000)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def enumerated(toy, method):
    n = len(toy.completion_ids)
    return torch.stack([method([prompt] * n, toy.completions, toy.completion_ids) for prompt in toy.prompts])


def all_features(toy, *functions):
    columns = [torch.tensor(f(completions=toy.completions, completion_ids=toy.completion_ids)) for f in functions]
    return torch.stack([column.double() for column in columns], -1)  # (N, F)


def exact(toy, features, moments, allowed=None):
    """λ by the root of the moment equations; log Z (P,) and KL(π*‖π0) by enumeration."""
    log_prior = toy.log_prior.double()
    if allowed is not None:
        log_prior = log_prior.masked_fill(~allowed, -math.inf)

    def posterior(lambdas):
        return (log_prior + features @ torch.as_tensor(lambdas)).softmax(-1)  # (P, N)

    def gap(lambdas):
        return (posterior(lambdas) @ features).mean(0).numpy() - moments

    solution = root(gap, [0.0] * len(moments), tol=1e-10)
    assert solution.success
    p = posterior(solution.x)
    kl = torch.where(p > 0, p * (p.log() - toy.log_prior), 0.0).sum(-1).mean()
    return solution.x, (log_prior + features @ torch.tensor(solution.x)).logsumexp(-1).mean(), kl


def assert_within(estimate, standard_error, truth, what):
    z = (estimate - float(truth)) / standard_error
    assert abs(z) < 4, f"{what}: {estimate} for {float(truth)}, off by {z:.1f} standard errors"


WANTED = {"has b": (has_b, 0.75), "words": (words, 3.3)}


@pytest.mark.slow
@pytest.mark.parametrize("drawn_from", ["prior", "proposal"])
@pytest.mark.filterwarnings("ignore:λ rests on few draws")  # of the proposal, which k̂ calls wide of the mark
def test_lambda_z_and_kl_are_the_exact_ones(large_toy, drawn_from):
    proposal = None
    if drawn_from == "proposal":
        proposal = prior_of(large_toy, large_toy.random_policy(noise=0.03))
    prior = prior_of(large_toy)
    posterior = prior.constrain(WANTED, large_toy.prompts, num_samples=1500, generator=seeded(), proposal=proposal)
    summary = posterior.likelihood.summary
    features = all_features(large_toy, has_b, words)
    lambdas, log_z, kl = exact(large_toy, features, [0.75, 3.3])
    assert min(abs(lambdas)) > 0.3
    for (name, feature), truth in zip(summary.features.items(), lambdas, strict=True):
        assert posterior.likelihood.lambdas[name] == feature.lam
        assert_within(feature.lam, feature.standard_error, truth, f"λ of {name}")
    assert_within(summary.log_z, summary.log_z_standard_error, log_z, "log Z")
    assert_within(summary.kl, summary.kl_standard_error, kl, "KL")
    assert summary.kl_standard_error < 0.05
    if drawn_from == "prior":
        assert summary.trustworthy.all()

    # the moments of the fitted posterior, by enumeration
    log_density = enumerated(large_toy, posterior.log_density)
    reached = (log_density.double().softmax(-1) @ features).mean(0)
    for feature, truth in zip(summary.features.values(), reached, strict=True):
        assert_within(feature.reached, feature.reached_standard_error, truth, "moment reached")
    before = (large_toy.log_prior.double().exp() @ features).mean(0)
    assert [feature.prior for feature in summary.features.values()] == pytest.approx(before.tolist(), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("forbid", [False, True])
def test_moments_on_top_of_other_evidence(large_toy, forbid):
    base = prior_of(large_toy).condition(no_c) if forbid else prior_of(large_toy).tilt(toy_reward, beta=1.5)
    posterior = base.constrain({"b": (has_b, 0.8)}, large_toy.prompts, num_samples=1500, generator=seeded())
    feature = posterior.likelihood.likelihoods[1].summary.features["b"]
    log_base = enumerated(large_toy, base.log_density).double().log_softmax(-1)  # (P, N)
    has = all_features(large_toy, has_b)[:, 0]  # (N,)
    solution = root(lambda lam: ((log_base + lam[0] * has).softmax(-1) @ has).mean().item() - 0.8, [0.0], tol=1e-10)
    assert_within(feature.lam, feature.standard_error, solution.x[0], "λ")
    assert abs(solution.x[0]) > 5 * feature.standard_error
    p = (log_base + solution.x[0] * has).softmax(-1)
    kl = torch.where(p > 0, p * (p.log() - log_base), 0.0).sum(-1).mean()
    summary = posterior.likelihood.likelihoods[1].summary
    assert summary.kl == pytest.approx(kl.item(), rel=0.25)
    # and what was evidence before still is
    n = len(large_toy.completion_ids)
    rows = ([large_toy.prompts[0]] * n, large_toy.completions, large_toy.completion_ids)
    assert_close(posterior.log_likelihood(*rows), base.log_likelihood(*rows) + feature.lam * has.float())


def test_evidence_that_forbids_every_draw(toy):
    def never(completions, **kwargs):
        return [False] * len(completions)

    with pytest.raises(ValueError, match="`evidence` must allow some draw of each prompt, and forbids all 20 of 'a'"):
        prior_of(toy).condition(never).constrain({"b": (has_b, 0.8)}, toy.prompts, num_samples=20)


def test_log_likelihood_is_lambda_times_phi(toy):
    constraints = {"has a": (has_a, 0.6), "words": (words, 2.2)}
    posterior = prior_of(toy).constrain(constraints, toy.prompts, generator=seeded())
    lam = posterior.likelihood.lambdas
    assert isinstance(posterior.likelihood, Likelihood)
    expected = all_features(toy, has_a, words) @ torch.tensor([lam["has a"], lam["words"]], dtype=torch.float64)
    assert_close(enumerated(toy, posterior.log_likelihood), expected.float().expand(3, -1))
    check_posterior(posterior, toy.prompts, enumerable=toy)
    assert posterior.bound is None  # of `words` no bounds are known
    check_posterior(posterior.tilt(toy_reward, 0.5).condition(has_b), toy.prompts, enumerable=toy)


@pytest.mark.filterwarnings("ignore:λ rests on few draws")
def test_features_are_evaluated_once(toy):
    calls = []

    def counted(completions, **kwargs):
        calls.append(len(completions))
        return has_b(completions)

    prior_of(toy).constrain({"b": (counted, 0.8)}, toy.prompts, num_samples=100, generator=seeded())
    assert calls == [300]


def test_the_bound_of_binary_features_is_reached(toy):
    for moment in (0.2, 0.9):
        posterior = prior_of(toy).constrain({"b": (has_b, moment)}, toy.prompts, generator=seeded())
        lam = posterior.likelihood.lambdas["b"]
        assert posterior.bound == max(lam, 0)
        assert enumerated(toy, posterior.log_likelihood).max() == pytest.approx(posterior.bound)
    likelihood = MomentLikelihood({"w": words, "b": has_b}, {"w": -2.0, "b": 1.5}, {"w": (1, 3), "b": (0, 1)})
    assert likelihood.bound == pytest.approx(-2.0 + 1.5)
    assert MomentLikelihood({"w": words}, {"w": 1.0}, {"w": (0, math.inf)}).bound is None


@pytest.mark.parametrize("moment", [1, 0])
def test_a_binary_feature_at_one_is_a_condition(toy, moment):
    prior = prior_of(toy)
    posterior = prior.constrain({"b": (has_b, moment)}, toy.prompts, generator=seeded())

    def holds(completions, **kwargs):
        return [value == moment for value in has_b(completions)]

    conditioned = prior.condition(holds)
    assert_close(enumerated(toy, posterior.log_density), enumerated(toy, conditioned.log_density))
    assert posterior.bound == 0.0
    summary = posterior.likelihood.summary
    assert summary.features["b"].lam == (math.inf if moment else -math.inf)
    log_z = enumerated(toy, conditioned.log_density).logsumexp(-1).mean()
    assert_within(summary.log_z, summary.log_z_standard_error, log_z, "log Z")
    assert summary.kl == pytest.approx(-summary.log_z)
    check_posterior(posterior, toy.prompts, enumerable=toy)


def test_a_condition_and_a_moment_together(large_toy):
    posterior = prior_of(large_toy).constrain(
        {"words": (words, 3.2), "no c": (no_c, 1), "b": (has_b, 0.7)},
        large_toy.prompts,
        num_samples=1500,
        generator=seeded(1),
    )
    allowed = torch.tensor(["c" not in text for text in large_toy.completions])
    features = all_features(large_toy, words, has_b)
    lambdas, log_z, kl = exact(large_toy, features, [3.2, 0.7], allowed)
    summary = posterior.likelihood.summary
    for name, truth in zip(("words", "b"), lambdas, strict=True):
        assert_within(summary.features[name].lam, summary.features[name].standard_error, truth, name)
    assert_within(summary.log_z, summary.log_z_standard_error, log_z, "log Z")
    assert_within(summary.kl, summary.kl_standard_error, kl, "KL")
    assert (enumerated(large_toy, posterior.log_likelihood)[:, ~allowed] == -math.inf).all()


def test_the_summary_is_a_table(toy):
    def short(completion_ids, **kwargs):
        return [len(ids) < 3 for ids in completion_ids]

    constraints = {"has [a]": (has_a, 0.3), "short": (short, 1)}
    summary = prior_of(toy).constrain(constraints, toy.prompts, generator=seeded()).likelihood.summary
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary)
    text = console.export_text()
    feature = summary.features["has [a]"]
    assert f"{feature.lam:.3f} ± {feature.standard_error:.3f}" in text
    assert "has [a]" in text
    assert "∞: a condition" in text
    assert "3 prompts, 256 draws each: importance ESS" in text
    assert f"KL(π*‖π0) {summary.kl:.3f}" in text


def test_columns_are_repeated_for_the_draws(toy):
    def same(completions, word, **kwargs):
        return [w in completion for completion, w in zip(completions, word, strict=True)]

    posterior = prior_of(toy).constrain(
        {"same": (same, 0.6)}, toy.prompts, generator=seeded(), columns={"word": ["a", "b", "a"]}
    )
    values = torch.tensor([[w in text for text in toy.completions] for w in ("a", "b", "a")]).double()
    log_density = toy.log_prior + posterior.likelihood.lambdas["same"] * values
    reached = (log_density.softmax(-1) * values).sum(-1).mean()
    feature = posterior.likelihood.summary.features["same"]
    assert_within(feature.reached, feature.reached_standard_error, reached, "moment")


@pytest.mark.parametrize("word", [["a"], "aba"])
def test_columns_have_an_entry_for_each_prompt(toy, word):
    with pytest.raises(ValueError, match=r"`columns\['word'\]` must have one entry for each of the 3 prompts, got"):
        prior_of(toy).constrain({"b": (has_b, 0.6)}, toy.prompts, generator=seeded(), columns={"word": word})


def test_a_count_that_was_one_at_most_is_no_condition(toy):
    """Where its bounds say that it can be more: on these draws its mean cannot be 1."""
    with pytest.raises(ValueError, match=r"'b' must be inside .* between 0 and 1 .*got 1, on the edge"):
        prior_of(toy).constrain({"b": (has_b, 1)}, toy.prompts, generator=seeded(), feature_bounds={"b": (0, 3)})
    posterior = prior_of(toy).constrain(
        {"b": (has_b, 0.7)}, toy.prompts, generator=seeded(), feature_bounds={"b": (0, 3)}
    )
    assert posterior.bound == pytest.approx(3 * posterior.likelihood.lambdas["b"])


def test_few_draws_are_told(toy):
    with pytest.warns(UserWarning, match=r"λ rests on few draws: 3 prompts, 12 draws each.*`proposal`") as caught:
        prior_of(toy).constrain({"a": (has_a, 0.6)}, toy.prompts, num_samples=12, generator=seeded())
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior_of(toy).constrain({"a": (has_a, 0.6)}, toy.prompts, num_samples=300, generator=seeded())
        # a handful of values: fewer than five draws above the ties of the tail, which says nothing against the others
        constraints = {"a": (has_a, 0.6), "words": (words, 2.2)}
        summary = prior_of(toy).constrain(constraints, toy.prompts, generator=seeded()).likelihood.summary
    assert (summary.khat == math.inf).any()
    assert summary.importance_ess.min() > 100


def never(completions, **kwargs):
    return [False] * len(completions)


def has_no_b(completions, **kwargs):
    return [not value for value in has_b(completions)]


def fails(completions, **kwargs):
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("constraints", "error", "message"),
    [
        ({"b": (has_b, 1.5)}, ValueError, "moment of 'b' must be inside .* between 0 and 1 .*got 1.5.*`num_samples`"),
        ({"w": (words, 3)}, ValueError, "'w' must be inside .* between 1 and 3 .*got 3, on the edge"),
        ({"no": (never, 0.5)}, ValueError, "'no' must vary"),
        ({"no": (never, 1)}, ValueError, "'no' = 1 by 0 of the 256 draws of prompt 'a' .3 of 3 prompts.*`proposal`"),
        ({"b": (has_b, 1), "n": (has_no_b, 1)}, ValueError, "conditions must not contradict each other.*by none of"),
        ({"b": (has_b, 0.4), "n": (has_no_b, 0.5)}, ValueError, "moments must not contradict each other"),
        ({"b": (has_b, 0.4), "n": (has_no_b, 0.6)}, ValueError, "'b', 'n' must not follow from each other"),
        ({"f": (fails, 0.5)}, RuntimeError, "no"),
        ({"n": (lambda completions, **k: [math.nan] * len(completions), 0.5)}, ValueError, "returned nan"),
        ({"n": (lambda completions, **k: [None] * len(completions), 0.5)}, ValueError, "'n' must be .*None in row 0"),
        ({"n": (lambda completions, **k: [1.0], 0.5)}, ValueError, "768 completions, got 1"),
        ({"b": (has_b, math.nan)}, ValueError, "moment of 'b' must be a number, got nan"),
        ({"b": (has_b, math.inf)}, ValueError, "moment of 'b' must be finite"),
        ({"b": (has_b, "half")}, TypeError, "moment of 'b' must be a number, got 'half'"),
        ({"b": 0.5}, TypeError, r"must map names to \(feature, moment\), got 'b': 0.5"),
        ({has_b: 0.5}, TypeError, "must map names"),
        ({}, TypeError, "must map names"),
    ],
)
def test_what_cannot_be(toy, constraints, error, message):
    with pytest.raises(error, match=message):
        prior_of(toy).constrain(constraints, toy.prompts, generator=seeded())


def test_proposals_of_another_support(toy):
    other = LanguageModel(toy.model, toy.tokenizer, 2)
    with pytest.raises(ValueError, match=r"`proposal` must draw completions of the prior's support.*got \(2,"):
        prior_of(toy).constrain({"b": (has_b, 0.5)}, toy.prompts, proposal=other)
    with pytest.raises(ValueError, match="`num_samples` must be an integer of at least 2"):
        prior_of(toy).constrain({"b": (has_b, 0.5)}, toy.prompts, num_samples=1)


def test_a_feature_that_leaves_its_range_is_refused():
    likelihood = MomentLikelihood({"w": words}, {"w": 0.5}, {"w": (0, 1)})
    assert likelihood.log_likelihood(["p"], ["a"], [[0]]).tolist() == [0.5]
    with pytest.raises(ValueError, match=r"'w' must be between 0 and 1.*got 2 in row 1.*`feature_bounds="):
        likelihood.log_likelihood(["p", "p"], ["a", "b"], [[0], [1, 2]])
    with pytest.raises(ValueError, match="'w' must be 0 or 1, since λ is infinite, got 2 in row 0"):
        MomentLikelihood({"w": words}, {"w": math.inf}).log_likelihood(["p"], ["b"], [[1, 2]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({}, {}), ValueError, "at least one feature"),
        (({"w": words}, {"b": 1.0}), ValueError, "must have the names of `features`"),
        (({"w": words}, {"w": math.nan}), ValueError, r"`lambdas\['w'\]` must be a number, got nan"),
        (({"w": words}, {"w": 1.0}, {"b": (0, 1)}), ValueError, "names of features.*got 'b'"),
        (({"w": words}, {"w": 1.0}, {"w": (1, 0)}), ValueError, "low < high, got"),
        (({"w": 3}, {"w": 1.0}), TypeError, "functions"),
    ],
)
def test_arguments_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        MomentLikelihood(*arguments)
