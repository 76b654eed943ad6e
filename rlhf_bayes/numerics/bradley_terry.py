"""Pairwise preferences: losses for soft and noisy labels, agreement of votes, and metrics of a reward's predictions.

Δ = r(chosen) − r(rejected), and P(chosen ≻ rejected) = σ(Δ) (Bradley & Terry 1952). `chosen_prob` is the share of
votes for `chosen`, a tie being half a vote for each side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_bayes.numerics.calibration import brier_score, checked_probability, expected_calibration_error, fp32
from rlhf_bayes.numerics.proportions import clopper_pearson


def bradley_terry_loss(delta: Tensor, chosen_prob: Tensor | None = None) -> Tensor:
    """
    Cross-entropy of a preference, per pair: `−p log σ(Δ) − (1 − p) log σ(−Δ)`.

    Its minimum over Δ is the entropy of p, at Δ = log p/(1 − p). With p = 1 it is TRL's loss, digit for digit.

    Args:
        delta (`torch.Tensor`): r(chosen) − r(rejected), any shape (..., B); subtract a margin first.
        chosen_prob (`torch.Tensor`, *optional*): p in [0, 1], of a shape that broadcasts to that of `delta`; 1 by
            default.

    Returns:
        `torch.Tensor`: loss in nats, shape of `delta`, fp32 or better.

    Raises:
        ValueError: if p is outside [0, 1], or does not broadcast to the shape of `delta`.

    Source: Bradley & Terry 1952; soft labels: Christiano et al. 2017, arXiv 1706.03741, section 2.2.3.
    """
    delta = fp32(delta)
    if chosen_prob is None:
        return -F.logsigmoid(delta)
    p = checked_probability("chosen_prob", chosen_prob, delta).to(delta)
    return -p * F.logsigmoid(delta) - (1 - p) * F.logsigmoid(-delta)


def smoothed(chosen_prob: Tensor, noise: float) -> Tensor:
    """
    The probability of a vote that is wrong with probability ε: `(1 − ε) p + ε (1 − p)`.

    Args:
        chosen_prob (`torch.Tensor`): p in [0, 1], any shape.
        noise (`float`): ε in [0, 1/2], from [`noise_from_agreement`], or a label smoothing.

    Returns:
        `torch.Tensor`: probability, same shape, fp32 or better; p itself where ε = 0.

    Raises:
        ValueError: if p or ε is out of range.
    """
    if not 0 <= noise <= 0.5:
        raise ValueError(
            f"`noise` must be in [0, 0.5], got {noise}: above one half a label is wrong more often than right. Swap "
            "chosen and rejected if that is meant."
        )
    p = checked_probability("chosen_prob", chosen_prob)
    return (1 - noise) * p + noise * (1 - p)


def noise_from_agreement(agreement: float) -> float:
    """
    How often a vote is wrong, from how often two agree: ε with `a = (1 − ε)² + ε²`, so `ε = (1 − √(2a − 1)) / 2`.

    Args:
        agreement (`float`): probability a that two annotators agree on a pair, in (1/2, 1].

    Returns:
        `float`: ε in [0, 1/2). No model predicts a vote with a probability above 1 − ε. Where some pairs are clearer
            than others, the bound is lower still (by Jensen's inequality).

    Raises:
        ValueError: if `agreement` is outside (1/2, 1].
    """
    if not 0.5 < agreement <= 1:
        raise ValueError(
            f"`agreement` must be in (0.5, 1], got {agreement}: two annotators who toss coins agree half of the time, "
            "and such votes say nothing. Pass a share, not a percentage, and count ties apart."
        )
    return (1 - math.sqrt(2 * agreement - 1)) / 2


def votes_to_prob(votes: Tensor) -> Tensor:
    """
    Share of the votes for `chosen`, a tie being half a vote: `(c + t/2) / (c + r + t)`.

    Args:
        votes (`torch.Tensor`): counts (..., 3) for chosen, rejected and tie.

    Returns:
        `torch.Tensor`: probability (...), fp32 or better.

    Raises:
        ValueError: if counts are not (..., 3), are negative or not whole, or a pair has no votes.
    """
    votes = _checked_votes(votes)
    total = votes.sum(-1)  # (...)
    without = (total == 0).flatten().nonzero().flatten().tolist()
    if without:
        raise ValueError(
            f"`votes` must hold at least one vote a pair, got none for {len(without)} of {total.numel()} pairs, the "
            f"first in row {without[0]}. Leave such pairs out."
        )
    return (votes[..., 0] + 0.5 * votes[..., 2]) / total


def agreement(votes: Tensor) -> float:
    """
    Probability that two votes on a pair agree, ties left out: `Σ c(c − 1) + r(r − 1)  /  Σ n(n − 1)`, n = c + r.

    The pairs of votes are pooled over all pairs of texts, so it is unbiased for any numbers of votes.

    Args:
        votes (`torch.Tensor`): counts (N, 3) for chosen, rejected and tie.

    Returns:
        `float`: between 0 and 1; nan where no pair has two votes that are not ties.

    Raises:
        ValueError: if counts are not (N, 3), are negative or not whole.
    """
    votes = _checked_votes(votes).detach().double().cpu()
    chosen, rejected, _ = votes.unbind(-1)
    n = chosen + rejected
    total = (n * (n - 1)).sum()
    agreeing = (chosen * (chosen - 1) + rejected * (rejected - 1)).sum()
    return float(agreeing / total) if total > 0 else math.nan


def noisy_vote_loss(delta: Tensor, votes: Tensor, error_rate: Tensor) -> Tensor:
    """
    Cross-entropy of votes by annotators who err: `−v log q − (1 − v) log(1 − q)`, `q = (1 − ε) σ(Δ) + ε σ(−Δ)`.

    Unlike the loss of a smoothed label it bounds the influence of one vote: its gradient vanishes where the vote is
    almost surely an error.

    Args:
        delta (`torch.Tensor`): r(chosen) − r(rejected), (B, 1).
        votes (`torch.Tensor`): v (B, A): 1 for chosen, 0 for rejected, 1/2 for a tie.
        error_rate (`torch.Tensor`): ε in [0, 1] of the annotator who gave the vote, (B, A) or of a shape that
            broadcasts to it; inside (0, 1) where it has a gradient.

    Returns:
        `torch.Tensor`: loss in nats, (B, A), fp32 or better.

    Raises:
        ValueError: if votes or rates are outside [0, 1], or the shapes do not fit.

    Source: a mixture of right and wrong answers as in Dawid & Skene 1979; for rankings Chen et al. 2013 (Crowd-BT).
    """
    log_right, log_wrong, v = _vote_mixture(delta, votes, error_rate)
    log_q = torch.logaddexp(log_right[0], log_wrong[0])  # (B, A)
    log_not_q = torch.logaddexp(log_right[1], log_wrong[1])  # (B, A)
    return -v * log_q - (1 - v) * log_not_q


def vote_error_prob(delta: Tensor, votes: Tensor, error_rate: Tensor) -> Tensor:
    """
    Posterior probability that a vote was an error: `ε σ(−Δ) / q` for a vote for chosen, `ε σ(Δ) / (1 − q)` against it.

    Its mean over an annotator's votes is the next ε of expectation maximisation. A tie counts as half of each vote.

    Args:
        delta (`torch.Tensor`): r(chosen) − r(rejected), (B, 1).
        votes (`torch.Tensor`): v (B, A): 1 for chosen, 0 for rejected, 1/2 for a tie.
        error_rate (`torch.Tensor`): ε in [0, 1] of the annotator who gave the vote, (B, A).

    Returns:
        `torch.Tensor`: probability (B, A), fp32 or better.

    Raises:
        ValueError: if votes or rates are outside [0, 1], or the shapes do not fit.

    Source: Dawid & Skene 1979, for two classes and one error rate an annotator.
    """
    log_right, log_wrong, v = _vote_mixture(delta, votes, error_rate)
    # the sigmoid of the log-odds, rather than the quotient, which may be 0/0
    return v * (log_wrong[0] - log_right[0]).sigmoid() + (1 - v) * (log_wrong[1] - log_right[1]).sigmoid()


def preference_metrics(
    chosen: Tensor, rejected: Tensor, chosen_prob: Tensor | None = None, votes: Tensor | None = None
) -> dict[str, float]:
    """
    How well the mean of K reward models predicts N preferences: `prob = mean_k σ(Δ_k)`, `reward = mean_k r_k`.

    - `accuracy`: sign of Δ of the mean reward against the plurality label; pairs with p = 1/2 are left out, Δ = 0
      counts half. `accuracy_low` and `accuracy_high`: its exact 95% interval, as if pairs were drawn independently.
    - `log_loss` (nats), `brier`, `ece`: of `prob`, against p.
    - `reward_chosen_mean`, `reward_chosen_std`, `reward_rejected_mean`, `reward_rejected_std`: over pairs.
    - `log_loss_member` (nats, mean over members), `disagreement` (mean over pairs of the standard deviation of Δ_k,
      in units of reward), `disagreement_vote` (share of pairs on which members prefer different texts): K > 1.
    - `vote_accuracy`: against a vote drawn at random, ties left out; `vote_ceiling`: the most that [`agreement`]
      allows, 1 − ε; `vote_accuracy_of_ceiling`: their ratio.

    Args:
        chosen (`torch.Tensor`): rewards of the chosen texts (K, N).
        rejected (`torch.Tensor`): rewards of the rejected texts (K, N).
        chosen_prob (`torch.Tensor`, *optional*): p (N,); by default the share of `votes`, or else 1.
        votes (`torch.Tensor`, *optional*): counts (N, 3) for chosen, rejected and tie.

    Returns:
        `dict[str, float]`: the metrics that the data determine. Others are left out rather than nan: `accuracy` where
            every pair is a tie, the standard deviation of one pair or member, `vote_…` without votes, the ceiling
            where no pair has two votes or votes agree no more than by chance.

    Raises:
        ValueError: if there are no pairs, the shapes do not fit, rewards are not finite, or probabilities or votes are
            out of range.
    """
    chosen, rejected = _checked_rewards(chosen, rejected)
    delta = chosen - rejected  # (K, N)
    num_members, num_pairs = delta.shape
    if votes is not None:
        votes = _checked_votes(votes).detach().double().cpu()  # (N, 3)
        if votes.shape != (num_pairs, 3):
            raise ValueError(f"`votes` must be (N, 3) = ({num_pairs}, 3), got {tuple(votes.shape)}: one row a pair.")
    if chosen_prob is None:
        chosen_prob = torch.ones(num_pairs) if votes is None else votes_to_prob(votes)
    target = checked_probability("chosen_prob", chosen_prob, delta[0]).detach().double().cpu().expand(num_pairs)
    prob = delta.sigmoid().mean(0)  # (N,)
    metrics: dict[str, float] = {}
    hits = _hits(delta.mean(0))  # (N,)
    labelled = target != 0.5
    if labelled.any():
        right = torch.where(target > 0.5, hits, 1 - hits)[labelled]
        metrics["accuracy"] = float(right.mean())
        low, high = clopper_pearson(float(right.sum()), len(right))
        metrics |= {"accuracy_low": low, "accuracy_high": high}
    # in log space, since σ(Δ) may round to 0 or 1
    log_prob, log_not_prob = (
        F.logsigmoid(sign * delta).logsumexp(0) - math.log(num_members) for sign in (1, -1)
    )  # (N,)
    metrics["log_loss"] = float((-target * log_prob - (1 - target) * log_not_prob).mean())
    metrics["brier"] = brier_score(prob, target)
    metrics["ece"] = expected_calibration_error(prob, target)
    metrics |= _reward_metrics(chosen, rejected)
    if num_members > 1:
        metrics["log_loss_member"] = float(bradley_terry_loss(delta, target).mean())
        metrics["disagreement"] = float(delta.std(0, correction=0).mean())
        metrics["disagreement_vote"] = float(((delta > 0).any(0) & (delta < 0).any(0)).double().mean())
    return metrics if votes is None else metrics | _vote_metrics(hits, votes)


def _reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, rewards in (("chosen", chosen.mean(0)), ("rejected", rejected.mean(0))):  # (N,)
        metrics[f"reward_{name}_mean"] = float(rewards.mean())
        if len(rewards) > 1:
            metrics[f"reward_{name}_std"] = float(rewards.std())
    return metrics


def _vote_metrics(hits: Tensor, votes: Tensor) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for_chosen, for_rejected, _ = votes.unbind(-1)  # (N,)
    total = (for_chosen + for_rejected).sum()
    if total == 0:
        return metrics
    metrics["vote_accuracy"] = float((for_chosen * hits + for_rejected * (1 - hits)).sum() / total)
    measured = agreement(votes)
    if measured > 0.5:
        metrics["vote_ceiling"] = 1 - noise_from_agreement(measured)
        metrics["vote_accuracy_of_ceiling"] = metrics["vote_accuracy"] / metrics["vote_ceiling"]
    return metrics


def _hits(delta: Tensor) -> Tensor:
    return torch.where(delta == 0, 0.5, (delta > 0).double())


def _vote_mixture(delta: Tensor, votes: Tensor, error_rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Log-probabilities of a right vote and of a wrong one, each (2, B, A), and the votes (B, A).

    The first dimension is a vote for `chosen`, then one against it.
    """
    if delta.dim() != 2 or delta.size(1) != 1 or votes.dim() != 2 or len(votes) != len(delta):
        raise ValueError(
            f"`delta` must be (B, 1) and `votes` (B, A), got {tuple(delta.shape)} and {tuple(votes.shape)}: add a "
            "dimension for the annotators."
        )
    delta = fp32(delta)
    v = checked_probability("votes", votes).to(delta)  # (B, A)
    rate = checked_probability("error_rate", error_rate, v).to(delta)
    log_sigmoid = torch.stack([F.logsigmoid(delta), F.logsigmoid(-delta)])  # (2, B, 1)
    return torch.log1p(-rate) + log_sigmoid, rate.log() + log_sigmoid.flip(0), v


def _checked_votes(votes: Tensor) -> Tensor:
    if votes.dim() == 0 or votes.size(-1) != 3:
        raise ValueError(
            f"`votes` must be (..., 3), counts for chosen, rejected and tie, got shape {tuple(votes.shape)}. Add a "
            "column of zeros where ties were not allowed."
        )
    votes = fp32(votes)
    # written as "not inside", so that nan is refused too
    wrong = ~((votes >= 0) & (votes < torch.inf) & (votes == votes.round()))
    if wrong.any():
        raise ValueError(
            f"`votes` must be counts, whole numbers of 0 or more, got {votes.detach()[wrong][0].item():g}. Pass "
            "shares of votes as `chosen_prob`."
        )
    return votes


def _checked_rewards(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    if chosen.dim() != 2 or chosen.numel() == 0 or chosen.shape != rejected.shape:
        raise ValueError(
            f"`chosen` and `rejected` must both be (K, N), members by pairs, neither empty, got {tuple(chosen.shape)} "
            f"and {tuple(rejected.shape)}. For one model, add a dimension: `rewards[None]`."
        )
    for name, rewards in (("chosen", chosen), ("rejected", rejected)):
        wrong = (~rewards.isfinite()).sum().item()
        if wrong:
            raise ValueError(
                f"`{name}` must be finite rewards, got nan or infinity for {wrong} of {rewards.numel()}: training may "
                "have diverged. Lower the learning rate."
            )
    return chosen.detach().double().cpu(), rejected.detach().double().cpu()
