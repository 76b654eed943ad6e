"""Exact confidence intervals of a probability from counts, also from counts in clusters."""

from collections.abc import Sequence

from scipy.stats import beta
from scipy.stats import t as student


def clopper_pearson(
    successes: float, trials: float, confidence: float = 0.95, stopped_at_success: bool = False
) -> tuple[float, float]:
    r"""
    Exact interval of a probability: it covers the true value with a probability of at least `confidence`.

        low = Beta(a/2; k, n − k + 1),    high = Beta(1 − a/2; k + 1, n − k),    a = 1 − confidence

    Where trials went on until the k-th success, the last trial could not have failed, so the upper end is that of
    k − 1 successes in n − 1 trials. With both rules the interval is exact for trials that end with the k-th success or
    when a budget is used up.

    Args:
        successes (`float`): k, a count, or a share of an effective number of trials.
        trials (`float`): n, at least 1.
        confidence (`float`): between 0 and 1.
        stopped_at_success (`bool`): whether the trials ended with the k-th success, for a k that was fixed beforehand.

    Returns:
        `tuple[float, float]`: low and high, probabilities.

    Raises:
        ValueError: if the counts or the confidence are impossible.

    Source: Clopper & Pearson 1934, Biometrika 26; where the k-th success is last, the same with the negative binomial.
    """
    if not 0 <= successes <= trials or trials < 1 or (stopped_at_success and successes == 0):
        raise ValueError(
            f"`successes` must be between 0 and `trials` (1 where the last trial succeeded), got {successes} of "
            f"{trials}."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    tail = (1 - confidence) / 2
    failures = trials - successes
    low = float(beta.ppf(tail, successes, failures + 1)) if successes > 0 else 0.0
    first = successes + (not stopped_at_success)
    high = float(beta.ppf(1 - tail, first, failures)) if failures > 0 else 1.0
    return low, high


def clustered_proportion(shares: Sequence[float], draws: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""
    Interval of a mean share over clusters, for instance prompts, that stays within [0, 1] and never has width 0.

        n* = min(p·(1 − p)/v · (t_{Pn−1}/t_{P−1})², P·n),    [`clopper_pearson`] of n*·p successes in n* trials

    p is the mean of the P shares, v the variance of p estimated from their spread, and t Student's quantile with that
    many degrees of freedom. Where all trials of all clusters had the same outcome, n* is their number. With a single
    cluster the interval is for this cluster only.

    Args:
        shares (`Sequence[float]`): the share of successes in each of P clusters.
        draws (`int`): n, the number of trials in each cluster.
        confidence (`float`): between 0 and 1.

    Returns:
        `tuple[float, float]`: low and high, probabilities.

    Raises:
        ValueError: if there is no cluster, a share is outside [0, 1], or `clopper_pearson` refuses the counts.

    Source: Korn & Graubard 1998, Survey Methodology 24(2), pages 193 to 201.
    """
    if not shares or not all(-1e-9 <= share <= 1 + 1e-9 for share in shares):
        raise ValueError(f"`shares` must be shares between 0 and 1, at least one, got {list(shares)}.")
    clusters, trials = len(shares), float(len(shares) * draws)
    mean = min(max(sum(shares) / clusters, 0.0), 1.0)
    deviations = sum((share - mean) ** 2 for share in shares)
    spread = deviations / max(clusters - 1, 1) / clusters
    if spread > 0 and 0 < mean < 1:
        tail = (1 + confidence) / 2
        ratio = float(student.ppf(tail, max(trials - 1, 1)) / student.ppf(tail, clusters - 1))
        trials = min(max(mean * (1 - mean) / spread * ratio**2, 1.0), trials)
    return clopper_pearson(mean * trials, trials, confidence)
