"""Rejection sampling on an enumerated model: exact draws, quasi-rejection, GUARD; log Z; what is refused."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes import numerics
from rlhf_bayes.numerics import quasi_rejection_curve
from rlhf_bayes.samplers import RejectionSampler, Sampler

from .enumerated import (
    assert_draws_follow,
    assert_within,
    conditioned,
    few_a,
    max_evidence,
    policy_of,
    prior_of,
    seeded,
    tilted,
)


@pytest.mark.slow
def test_from_the_prior_a_bound_makes_draws_exact(toy):
    sampler: Sampler = RejectionSampler(log_bound=max_evidence(toy), max_draws=50_000)
    draws = sampler.sample(tilted(toy), toy.prompts, 800, seeded())
    assert draws.counts.tolist() == [800] * 3
    assert (draws.guarantee, draws.log_weights) == ("exact", None)
    assert_draws_follow(toy, draws, toy.log_posterior())
    exact = (toy.log_z() - max_evidence(toy)).exp()
    error = (exact * (1 - exact) / torch.tensor(draws.info["draws"])).sqrt()
    for estimate, se, truth in zip(draws.info["acceptance"], error, exact, strict=True):
        assert_within(estimate, se, truth, "acceptance")


def test_a_condition_knows_its_bound(toy):
    posterior = prior_of(toy).condition(few_a)
    draws = RejectionSampler().sample(posterior, toy.prompts, 500, seeded(1))
    log_posterior, log_z = conditioned(toy)
    assert all(few_a(draws.completions))
    assert_draws_follow(toy, draws, log_posterior)
    assert ((draws.log_z.low < log_z) & (log_z < draws.log_z.high)).all()
    assert_close(draws.log_z.log_z, log_z, atol=0.2, rtol=0)


@pytest.mark.parametrize("max_draws", [12, 10_000])
def test_the_interval_on_log_z_covers_it(toy, max_draws):
    """Nine times in ten or more, whether the budget ends the run or the n-th acceptance; log Ẑ is unbiased for Z."""
    posterior = prior_of(toy).condition(few_a)
    _, log_z = conditioned(toy)
    prompts = [toy.prompts[0]] * 400
    sampler = RejectionSampler(max_draws=max_draws, confidence=0.9)
    draws = sampler.sample(posterior, prompts, 4, seeded())
    covered = (draws.log_z.low <= log_z[0]) & (log_z[0] <= draws.log_z.high)
    assert covered.double().mean() > 0.9 - 3 * math.sqrt(0.09 / 400)
    z = draws.log_z.log_z.exp()
    assert_within(z.mean(), z.std() / 20, log_z[0].exp(), "Z")
    if max_draws == 12:
        assert 0 < (draws.counts < 4).sum() < 400  # both ways to end


def test_guard_keeps_the_draws_of_a_policy_that_meet_the_condition(toy):
    posterior, policy = prior_of(toy).condition(few_a), policy_of(toy)
    sampler = RejectionSampler(policy, log_bound=-math.inf, quasi=True)
    draws = sampler.sample(posterior, toy.prompts, 1000, seeded())
    log_q = toy.log_probs(policy.model).detach().double()
    log_p, log_z = conditioned(toy)
    guarded = log_q.masked_fill(log_p == -torch.inf, -torch.inf)
    acceptance, guarded = guarded.logsumexp(-1).exp(), guarded.log_softmax(-1)
    assert all(few_a(draws.completions))
    assert draws.guarantee == "bounded"
    assert_draws_follow(toy, draws, guarded)
    for prompt in range(3):
        error = math.sqrt(acceptance[prompt] * (1 - acceptance[prompt]) / draws.info["draws"][prompt])
        assert_within(draws.info["acceptance"][prompt], error, acceptance[prompt], "acceptance")
        # the interval is for 95 %: twice as wide is four standard errors
        half_width = (draws.log_z.high - draws.log_z.low)[prompt] / 2
        assert abs(draws.log_z.log_z[prompt] - log_z[prompt]) < 2 * half_width
    # the guarded policy is another distribution than the posterior: how far, is told
    assert_close(torch.tensor(draws.info["kl"]).double(), numerics.forward_kl(log_p, guarded), atol=0.03, rtol=0.2)
    assert_close(torch.tensor(draws.info["tv"]).double(), numerics.tv(log_p, guarded), atol=0.03, rtol=0.2)
    assert numerics.tv(log_p, guarded).min() > 0.05


def test_guard_is_closer_by_the_logarithm_of_its_acceptance(toy):
    """KL(p‖q·b/A) = KL(p‖q) + log A, exactly; and it is the limit of quasi-rejection at a bound of 0."""
    log_q = toy.log_probs(policy_of(toy).model).detach().double()
    log_p, log_z = conditioned(toy)
    guarded = log_q.masked_fill(log_p == -torch.inf, -torch.inf)
    log_acceptance, guarded = guarded.logsumexp(-1), guarded.log_softmax(-1)
    kl = numerics.forward_kl(log_p, guarded)
    assert_close(kl, numerics.forward_kl(log_p, log_q) + log_acceptance)
    log_weights = log_p + log_z[:, None] - log_q
    curve = quasi_rejection_curve(log_weights, torch.tensor([-math.inf]), log_q)
    assert_close(curve.acceptance[:, 0], log_acceptance.exp())
    assert_close(curve.kl[:, 0], kl)
    assert_close(curve.tv[:, 0], numerics.tv(log_p, guarded))
    assert_close(curve.log_z, log_z)


@pytest.mark.slow
def test_quasi_rejection_says_how_far_it_is(toy):
    """With a bound that weights exceed, the draws follow min(P, B·q), and TV and KL to the posterior are told."""
    log_bound = max_evidence(toy) - 3.0
    sampler = RejectionSampler(log_bound=log_bound, quasi=True, max_draws=50_000)
    draws = sampler.sample(tilted(toy), toy.prompts, 1500, seeded())
    capped = (toy.log_prior + toy.log_likelihood.clamp(max=log_bound)).double()
    log_prob, log_posterior = capped.log_softmax(-1), toy.log_posterior().double()
    assert draws.guarantee == "bounded"
    assert min(draws.info["exceeded"]) > 0
    assert_draws_follow(toy, draws, log_prob)
    tv, kl = numerics.tv(log_posterior, log_prob), numerics.forward_kl(log_posterior, log_prob)
    assert tv.min() > 0.03
    assert_close(torch.tensor(draws.info["tv"]).double(), tv, atol=0.02, rtol=0.15)
    assert_close(torch.tensor(draws.info["kl"]).double(), kl, atol=0.02, rtol=0.15)
    truth = toy.log_z().double()
    assert ((draws.log_z.log_z - truth).abs() < draws.log_z.high - draws.log_z.low).all()


def test_the_bound_is_chosen_for_a_wanted_distance(toy):
    draws = RejectionSampler(max_tv=0.1, pilot=2000).sample(tilted(toy), toy.prompts, 100, seeded())
    for prompt, log_bound in enumerate(draws.info["log_bound"]):
        weights, log_q = toy.log_likelihood[prompt], toy.log_prior[prompt]
        curve = quasi_rejection_curve(weights, torch.tensor([log_bound]), log_q)
        assert 0.03 < float(curve.tv) < 0.12
        assert log_bound < float(weights.max())  # so that more is accepted than by exact rejection


def test_rounds_and_seeds(toy):
    posterior = prior_of(toy).condition(few_a)
    first, again, other = (RejectionSampler().sample(posterior, toy.prompts, 30, seeded(s)) for s in (3, 3, 4))
    assert first.completion_ids == again.completion_ids
    assert first.completion_ids != other.completion_ids
    assert first.info["tokens"] > sum(map(len, first.completion_ids))


def test_columns_follow_their_prompts(toy):
    def starts_with(completions, word, **kwargs):
        return [str(completion).startswith(w) for completion, w in zip(completions, word, strict=True)]

    draws = RejectionSampler().sample(
        prior_of(toy).condition(starts_with), toy.prompts, 5, seeded(), columns={"word": ["a", "b", "a"]}
    )
    assert [text[0] for text in draws.texts] == ["a"] * 5 + ["b"] * 5 + ["a"] * 5


def never(completions, **kwargs):
    return [False] * len(completions)


def test_what_has_no_support(toy):
    with pytest.raises(ValueError, match=r"None of 50 completions drawn is allowed .* 3 of 3 prompts, the first 'a'"):
        RejectionSampler(max_draws=50).sample(prior_of(toy).condition(never), toy.prompts, 4, seeded())

    def not_for_a(prompts, **kwargs):
        return [prompt != "a" for prompt in prompts]

    with pytest.warns(UserWarning, match="1 of 3 prompts") as caught:
        draws = RejectionSampler(max_draws=50).sample(prior_of(toy).condition(not_for_a), toy.prompts, 4, seeded())
    assert caught[0].filename == __file__
    assert draws.counts.tolist() == [0, 4, 4]
    assert draws.log_z.log_z[0] == -math.inf
    # none in 50: below 0.071 with 97.5 % confidence
    assert draws.log_z.high[0] == pytest.approx(math.log(1 - 0.025 ** (1 / 50)))
    with pytest.raises(ValueError, match="`pilot` = 20 completions drawn is allowed"):
        RejectionSampler(max_tv=0.1, pilot=20).sample(prior_of(toy).condition(not_for_a), toy.prompts, 4)


def test_a_bound_that_is_exceeded_is_an_error(toy):
    sampler = RejectionSampler(log_bound=max_evidence(toy) - 2.0)
    with pytest.raises(ValueError, match=r"log-weight .* exceeds the bound, for completion .*`quasi=True`"):
        sampler.sample(tilted(toy), toy.prompts, 500, seeded())


def test_without_a_bound(toy):
    with pytest.raises(ValueError, match=r"knows no bound on its log-likelihood.*`max_tv`"):
        RejectionSampler().sample(tilted(toy), toy.prompts, 2)
    with pytest.raises(ValueError, match=r"proposal other than the prior.*GUARD"):
        RejectionSampler(policy_of(toy)).sample(prior_of(toy).condition(few_a), toy.prompts, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_bound": 0.0, "max_tv": 0.1}, "Pass one"),
        ({"max_tv": 1.0}, "below 1"),
        ({"log_bound": math.nan}, "number of nats"),
        ({"log_bound": math.inf}, "below infinity"),
        ({"log_bound": -math.inf}, "`quasi=True`"),
        ({"pilot": 1}, "`pilot` must be an integer of at least 2"),
        ({"max_draws": 0}, "`max_draws` must be an integer of at least 1"),
        ({"confidence": 1.0}, "`confidence` must be between 0 and 1"),
    ],
)
def test_options_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        RejectionSampler(**arguments)


@pytest.mark.parametrize(
    ("prompts", "n", "columns", "message"),
    [
        ([], 2, None, "`prompts` must be a non-empty list"),
        ("a", 2, None, "Pass a list"),
        (["a"], 0, None, "`n` must be an integer of at least 1, got 0"),
        (["a"], True, None, "`n` must be an integer"),
        (["a"], 2, {"word": ["x", "y"]}, r"`columns\['word'\]` must have one entry a prompt, 1, got 2"),
    ],
)
def test_requests_that_cannot_be_served(toy, prompts, n, columns, message):
    with pytest.raises(ValueError, match=message):
        RejectionSampler().sample(prior_of(toy).condition(few_a), prompts, n, columns=columns)


class Truncated:
    """A proposal of the prior's form that never draws the word "a", as top-k might."""

    def __init__(self, prior):
        self.prior = prior

    def sample(self, prompts, n=1, generator=None):
        raise AssertionError("must be refused before it is drawn from")

    def log_prob(self, prompts, completion_ids):
        log_prob = self.prior.log_prob(prompts, completion_ids)
        return log_prob.masked_fill(torch.tensor([0 in ids for ids in completion_ids]), -torch.inf)


def test_proposals_of_smaller_support(toy):
    posterior = prior_of(toy).condition(few_a)
    sampler = RejectionSampler(Truncated(posterior.prior), log_bound=0.0, quasi=True)
    with pytest.raises(ValueError, match=r"gives probability 0 to '.*a.*' of prompt .*Remove top-k"):
        sampler.sample(posterior, toy.prompts, 2, seeded())
    shorter = policy_of(toy)
    shorter.max_completion_length = 2
    with pytest.raises(ValueError, match=r"`proposal` must draw completions of the prior's support.*got \(2,"):
        RejectionSampler(shorter, log_bound=0.0).sample(posterior, toy.prompts, 2)
