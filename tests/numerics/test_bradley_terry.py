"""Losses, votes and metrics of preferences: against enumeration, other libraries' losses, and simulated annotators."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch.testing import assert_close

from rlhf_bayes.numerics import agreement, bradley_terry_loss, noise_from_agreement
from rlhf_bayes.numerics.bradley_terry import (
    noisy_vote_loss,
    preference_metrics,
    smoothed,
    vote_error_prob,
    votes_to_prob,
)

NAN, INF = math.nan, math.inf
DELTA = torch.tensor([1.3, -0.4, 0.0, 30.0, -120.0])
CHOSEN_PROB = torch.tensor([0.8, 0.3, 1.0, 0.0, 0.6])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_loss_is_the_binary_cross_entropy():
    expected = F.binary_cross_entropy_with_logits(DELTA, CHOSEN_PROB, reduction="none")
    assert_close(bradley_terry_loss(DELTA, CHOSEN_PROB), expected)
    members = torch.stack([DELTA, DELTA.flip(0)])  # (K, N)
    assert_close(bradley_terry_loss(members, CHOSEN_PROB)[0], expected)


def test_a_certain_label_is_the_loss_of_trl_to_the_last_digit():
    delta = torch.randn(500, generator=seeded())
    assert torch.equal(bradley_terry_loss(delta), -F.logsigmoid(delta))
    assert torch.equal(bradley_terry_loss(delta, torch.ones(500)), bradley_terry_loss(delta))
    assert bradley_terry_loss(delta.bfloat16()).dtype is torch.float32


def test_loss_is_lowest_at_the_log_odds():
    p = torch.tensor([0.8, 0.35])
    at_log_odds = (p / (1 - p)).log().requires_grad_()
    loss = bradley_terry_loss(at_log_odds, p)
    assert_close(loss, torch.distributions.Bernoulli(p).entropy())
    loss.sum().backward()
    assert_close(at_log_odds.grad, torch.zeros(2), rtol=0, atol=1e-6)


def test_smoothing_is_the_marginal_over_wrong_labels():
    p, noise = 0.7, 0.1
    # enumerate the preference and whether the label is wrong
    expected = 0.0
    for prefers_chosen, wrong in itertools.product((True, False), repeat=2):
        probability = (p if prefers_chosen else 1 - p) * (noise if wrong else 1 - noise)
        expected += probability * (prefers_chosen != wrong)
    assert_close(smoothed(torch.tensor([p]), noise), torch.tensor([expected]))
    assert torch.equal(smoothed(CHOSEN_PROB, 0.0), CHOSEN_PROB)
    assert_close(smoothed(CHOSEN_PROB, 0.5), torch.full((5,), 0.5))


@pytest.mark.parametrize(("agreed", "accuracy"), [(0.63, 0.755), (0.73, 0.839), (0.77, 0.867), (1.0, 1.0)])
def test_noise_of_published_agreements(agreed, accuracy):
    noise = noise_from_agreement(agreed)
    assert 1 - noise == pytest.approx(accuracy, abs=5e-4)
    assert (1 - noise) ** 2 + noise**2 == pytest.approx(agreed)


def test_votes_to_prob_by_hand():
    votes = torch.tensor([[[3, 1, 0], [0, 2, 0]], [[1, 0, 3], [0, 0, 2]]])
    assert_close(votes_to_prob(votes), torch.tensor([[0.75, 0.0], [0.625, 0.5]]))


def test_agreement_by_enumerating_pairs_of_votes():
    votes = torch.tensor([[3, 1, 2], [0, 4, 0], [1, 1, 0], [1, 0, 5], [2, 3, 1], [0, 0, 0]])
    same, pairs = 0, 0
    for chosen, rejected, _ in votes.tolist():
        for first, second in itertools.combinations("c" * chosen + "r" * rejected, 2):
            same += first == second
            pairs += 1
    assert agreement(votes) == pytest.approx(same / pairs)
    assert math.isnan(agreement(torch.tensor([[1, 0, 4], [0, 1, 0]])))


def test_agreement_of_simulated_annotators_gives_their_noise_back():
    noise, num_pairs = 0.2, 20_000
    num_votes = torch.randint(2, 6, (num_pairs,), generator=seeded(1))
    right = torch.binomial(num_votes.double(), torch.full((num_pairs,), 1 - noise).double(), generator=seeded(2))
    is_chosen = torch.rand(num_pairs, generator=seeded(3)) < 0.3
    votes = torch.stack([right, num_votes - right, torch.zeros(num_pairs)], -1)  # (N, 3)
    votes[~is_chosen] = votes[~is_chosen][:, [1, 0, 2]]
    measured, expected = agreement(votes), 0.8**2 + 0.2**2
    # votes of one pair go together: at most N independent agreements, of variance a(1 − a) each
    standard_error = math.sqrt(expected * (1 - expected) / num_pairs)
    assert abs(measured - expected) < 5 * standard_error
    # dε/da = −1/(2√(2a − 1)) = −1/1.2
    assert abs(noise_from_agreement(measured) - noise) < 5 * standard_error / 1.2


def test_noisy_votes_by_enumeration():
    delta = torch.tensor([[0.7], [-1.5]])
    votes = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])
    rates = torch.tensor([[0.05, 0.2, 0.4], [0.3, 0.0, 1.0]])
    loss, error = noisy_vote_loss(delta, votes, rates), vote_error_prob(delta, votes, rates)
    for row, column in itertools.product(range(2), range(3)):
        p, e = torch.sigmoid(delta[row, 0]).item(), rates[row, column].item()
        # joint probability of (vote for chosen, error)
        joint = {(True, False): p * (1 - e), (True, True): (1 - p) * e}
        joint |= {(False, False): (1 - p) * (1 - e), (False, True): p * e}
        of_vote = {vote: joint[vote, False] + joint[vote, True] for vote in (True, False)}
        v = votes[row, column].item()
        expected_loss = -v * math.log(of_vote[True]) - (1 - v) * math.log(of_vote[False])
        expected_error = v * joint[True, True] / of_vote[True] + (1 - v) * joint[False, True] / of_vote[False]
        assert loss[row, column].item() == pytest.approx(expected_loss, rel=1e-5)
        assert error[row, column].item() == pytest.approx(expected_error, rel=1e-5)


def test_a_perfect_annotator_is_the_plain_loss_also_far_out():
    delta = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    votes = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = noisy_vote_loss(delta, votes, torch.zeros(2, 2))
    assert_close(loss, bradley_terry_loss(delta, votes[:1, :1]) * votes + bradley_terry_loss(-delta) * (1 - votes))
    loss.sum().backward()
    assert_close(delta.grad, torch.tensor([[1.0], [-1.0]]))


def test_a_surely_wrong_vote_no_longer_pulls():
    delta = torch.tensor([[12.0]], requires_grad=True)
    noisy_vote_loss(delta, torch.tensor([[0.0]]), torch.tensor([[0.1]])).sum().backward()
    plain = torch.autograd.grad(bradley_terry_loss(delta, torch.zeros(1, 1)).sum(), delta)[0]
    assert plain > 0.99
    assert 0 < delta.grad < 1e-3


def test_gradient_of_noisy_votes():
    delta = torch.randn(3, 1, dtype=torch.float64, generator=seeded()).requires_grad_()
    rates = torch.tensor([0.1, 0.3], dtype=torch.float64).expand(3, 2).clone().requires_grad_()
    votes = torch.tensor([[1, 0], [0.5, 1], [0, 0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d, e: noisy_vote_loss(d, votes, e), (delta, rates))


def test_expectation_maximisation_finds_the_careless_annotator():
    rates, num_pairs = torch.tensor([0.05, 0.2, 0.45]), 4000
    delta = 2 * torch.randn(num_pairs, 1, generator=seeded(4))
    prefers_chosen = torch.rand(num_pairs, 3, generator=seeded(5)) < delta.sigmoid()
    wrong = torch.rand(num_pairs, 3, generator=seeded(6)) < rates
    votes = (prefers_chosen != wrong).float()
    estimate = torch.full((1, 3), 0.25)
    for _ in range(100):
        estimate = vote_error_prob(delta, votes, estimate).mean(0, keepdim=True)
    # information on ε per vote: E[tanh²(Δ/2) / (q(1 − q))]
    q = (1 - rates) * delta.sigmoid() + rates * (-delta).sigmoid()  # (N, 3)
    standard_error = ((delta / 2).tanh().square() / (q * (1 - q))).sum(0).rsqrt()  # (3,)
    assert ((estimate[0] - rates).abs() < 4 * standard_error).all(), (estimate, standard_error)
    # the maximum of the likelihood: its gradient is 0
    rate = estimate.clone().requires_grad_()
    gradient = torch.autograd.grad(noisy_vote_loss(delta, votes, rate.expand(num_pairs, 3)).mean(), rate)[0]
    assert_close(gradient, torch.zeros(1, 3), rtol=0, atol=1e-4)


def test_metrics_by_hand():
    # one member, four pairs: right, wrong, tied label, Δ = 0
    chosen, rejected = torch.tensor([[2.0, 0.0, 1.0, 3.0]]), torch.tensor([[1.0, 2.0, 0.5, 3.0]])
    chosen_prob = torch.tensor([1.0, 0.75, 0.5, 0.2])
    metrics = preference_metrics(chosen, rejected, chosen_prob)
    probs = [1 / (1 + math.exp(-d)) for d in (1.0, -2.0, 0.5, 0.0)]
    labels = chosen_prob.tolist()
    expected = {
        "accuracy": (1 + 0 + 0.5) / 3,
        "log_loss": -sum(p * math.log(q) + (1 - p) * math.log(1 - q) for p, q in zip(labels, probs, strict=True)) / 4,
        "brier": sum((p - q) ** 2 for p, q in zip(labels, probs, strict=True)) / 4,
        # confidences .731, .881, .622, .5 fall into four bins of width .05
        "ece": (abs(1 - probs[0]) + abs(0.25 - (1 - probs[1])) + abs(0.5 - probs[2]) + abs(0.5 - 0.5)) / 4,
        "reward_chosen_mean": 1.5,
        "reward_chosen_std": math.sqrt((0.25 + 2.25 + 0.25 + 2.25) / 3),
        "reward_rejected_mean": 1.625,
        "reward_rejected_std": torch.tensor([1.0, 2.0, 0.5, 3.0]).std().item(),
    }
    assert (metrics.pop("accuracy_low"), metrics.pop("accuracy_high")) == pytest.approx(
        (beta.ppf(0.025, 1.5, 2.5), beta.ppf(0.975, 2.5, 1.5))
    )
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_members_predict_together():
    generator = seeded(7)
    chosen, rejected = torch.randn(2, 3, 40, generator=generator, dtype=torch.float64)
    chosen_prob = torch.rand(40, generator=generator, dtype=torch.float64)
    metrics = preference_metrics(chosen, rejected, chosen_prob)
    delta = (chosen - rejected).numpy()
    losses, members, spread, split, hits, probs = [], [], [], 0, [], []
    for pair in range(40):
        p = chosen_prob[pair].item()
        each = [1 / (1 + math.exp(-d)) for d in delta[:, pair]]
        q = sum(each) / 3
        probs.append(q)
        losses.append(-p * math.log(q) - (1 - p) * math.log(1 - q))
        members += [-p * math.log(q) - (1 - p) * math.log(1 - q) for q in each]
        spread.append(delta[:, pair].std())
        split += len({d > 0 for d in delta[:, pair]}) == 2
        hits.append((delta[:, pair].sum() > 0) == (p > 0.5))
    assert metrics["log_loss"] == pytest.approx(sum(losses) / 40)
    assert metrics["log_loss_member"] == pytest.approx(sum(members) / 120)
    assert metrics["log_loss"] < metrics["log_loss_member"]  # Jensen
    assert metrics["disagreement"] == pytest.approx(sum(spread) / 40)
    assert metrics["disagreement_vote"] == pytest.approx(split / 40)
    assert metrics["accuracy"] == pytest.approx(sum(hits) / 40)
    assert metrics["reward_rejected_std"] == pytest.approx(rejected.mean(0).std().item())


def test_accuracy_is_of_the_mean_reward_not_of_the_majority():
    # two members barely against, one strongly for
    metrics = preference_metrics(torch.tensor([[-0.1], [-0.2], [5.0]]), torch.zeros(3, 1), torch.tensor([0.9]))
    assert metrics["accuracy"] == 1.0
    assert metrics["disagreement_vote"] == 1.0


def test_votes_and_their_ceiling():
    votes = torch.tensor([[4, 1, 0], [1, 3, 1], [0, 0, 2], [2, 2, 0]])
    chosen = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    metrics = preference_metrics(chosen, torch.zeros(1, 4), votes=votes)
    # 13 votes that are no ties; predicted: chosen, chosen, chosen, rejected
    assert metrics["vote_accuracy"] == pytest.approx((4 + 1 + 0 + 2) / 13)
    measured = (6 + 0 + 0 + 3 + 1 + 1) / (10 + 6 + 6)
    ceiling = (1 + math.sqrt(2 * measured - 1)) / 2 if measured > 0.5 else None
    assert ceiling is None
    assert "vote_ceiling" not in metrics
    # without the pair that splits evenly the votes agree more than by chance
    metrics = preference_metrics(chosen[:, :3], torch.zeros(1, 3), votes=votes[:3])
    ceiling = (1 + math.sqrt(2 * 9 / 16 - 1)) / 2
    assert metrics["vote_ceiling"] == pytest.approx(ceiling)
    assert metrics["vote_accuracy_of_ceiling"] == pytest.approx(5 / 9 / ceiling)
    # p is the share of votes unless it is given
    assert metrics["accuracy"] == 0.5
    assert preference_metrics(chosen[:, :3], torch.zeros(1, 3), torch.ones(3), votes[:3])["accuracy"] == 1.0


def test_no_prediction_passes_the_ceiling_where_pairs_differ_in_clarity():
    generator = seeded(8)
    clarity = torch.rand(30_000, generator=generator).double()  # P(chosen) of each pair
    for_chosen = torch.binomial(torch.full_like(clarity, 5), clarity, generator=generator)
    votes = torch.stack([for_chosen, 5 - for_chosen, torch.zeros_like(for_chosen)], -1)
    best = (clarity - 0.5)[None]
    metrics = preference_metrics(best, torch.zeros_like(best), votes=votes)
    # E max(p, 1 − p) = 3/4 for uniform p, under a ceiling of (1 + √(2·2/3 − 1))/2 = .789
    assert metrics["vote_accuracy"] == pytest.approx(0.75, abs=5 * math.sqrt(0.25 / 30_000))
    assert metrics["vote_ceiling"] == pytest.approx(0.789, abs=0.01)


def test_what_does_not_apply_is_left_out():
    all_ties = preference_metrics(
        torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), votes=torch.tensor([[0, 0, 3], [0, 0, 1]])
    )
    assert {"accuracy", "vote_accuracy", "vote_ceiling", "disagreement", "log_loss_member"}.isdisjoint(all_ties)
    one_pair = preference_metrics(torch.tensor([[1.0]]), torch.zeros(1, 1))
    assert "reward_chosen_std" not in one_pair
    assert one_pair["log_loss"] == pytest.approx(math.log(1 + math.exp(-1)))
    assert all(math.isfinite(value) for value in (all_ties | one_pair).values())
    far_out = preference_metrics(torch.tensor([[-800.0, 900.0]]), torch.zeros(1, 2))
    assert far_out["log_loss"] == pytest.approx(400.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bradley_terry_loss(DELTA, CHOSEN_PROB + 0.5), r"`chosen_prob` must be in \[0, 1\], got 1.3"),
        (lambda: bradley_terry_loss(DELTA, CHOSEN_PROB * NAN), r"`chosen_prob` must be in \[0, 1\], got nan"),
        (lambda: bradley_terry_loss(DELTA[:, None], CHOSEN_PROB), r"broadcasts to \(5, 1\), got \(5,\)"),
        (lambda: bradley_terry_loss(DELTA, CHOSEN_PROB[:3]), r"broadcasts to \(5,\), got \(3,\)"),
        (lambda: smoothed(CHOSEN_PROB, 0.6), r"`noise` must be in \[0, 0.5\], got 0.6"),
        (lambda: smoothed(CHOSEN_PROB - 0.5, 0.1), r"`chosen_prob` must be in \[0, 1\], got -0.2"),
        (lambda: noise_from_agreement(0.5), r"`agreement` must be in \(0.5, 1\], got 0.5: .*toss coins"),
        (lambda: noise_from_agreement(73), "not a percentage"),
        (lambda: noise_from_agreement(NAN), "got nan"),
        (lambda: votes_to_prob(torch.tensor([[1, 2]])), r"`votes` must be \(..., 3\).*got shape \(1, 2\)"),
        (
            lambda: votes_to_prob(torch.tensor([[1, -2, 0]])),
            "`votes` must be counts, whole numbers of 0 or more, got -2",
        ),
        (lambda: votes_to_prob(torch.tensor([[1, 0, NAN]])), "got nan"),
        (lambda: agreement(torch.tensor([[2.5, 0, 0]])), "got 2.5. Pass shares of votes as `chosen_prob`"),
        (lambda: votes_to_prob(torch.tensor([[1, 2, 0], [0, 0, 0]])), "none for 1 of 2 pairs, the first in row 1"),
        (lambda: agreement(torch.tensor([[3, -1, 0]])), "got -1"),
        (lambda: noisy_vote_loss(DELTA, torch.ones(5, 2), torch.zeros(5, 2)), r"`delta` must be \(B, 1\)"),
        (lambda: noisy_vote_loss(DELTA[:, None], torch.full((5, 2), -1), torch.zeros(5, 2)), "`votes` must be in"),
        (
            lambda: vote_error_prob(DELTA[:, None], torch.ones(5, 2), torch.ones(5, 3)),
            "`error_rate` must have a shape",
        ),
        (
            lambda: vote_error_prob(DELTA[:, None], torch.ones(5, 2), torch.full((5, 2), 1.5)),
            "`error_rate` must be in",
        ),
        (lambda: preference_metrics(DELTA, DELTA), r"must both be \(K, N\).*`rewards\[None\]`"),
        (lambda: preference_metrics(torch.zeros(2, 0), torch.zeros(2, 0)), "neither empty"),
        (lambda: preference_metrics(DELTA[None] * INF, DELTA[None]), "nan or infinity for 5 of 5"),
        (lambda: preference_metrics(DELTA[None], DELTA[None], CHOSEN_PROB[:4]), "`chosen_prob` must have a shape"),
        (lambda: preference_metrics(DELTA[None], DELTA[None], CHOSEN_PROB * 2), "`chosen_prob` must be in"),
        (lambda: preference_metrics(DELTA[None], DELTA[None], votes=torch.ones(4, 3)), r"\(5, 3\), got \(4, 3\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
