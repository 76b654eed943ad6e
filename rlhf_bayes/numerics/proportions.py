"""Exact confidence intervals of a probability from counts."""

from scipy.stats import beta


def clopper_pearson(
    successes: int, trials: int, confidence: float = 0.95, stopped_at_success: bool = False
) -> tuple[float, float]:
    r"""
    Exact interval of a probability: it covers the true value with a probability of at least `confidence`.

        low = Beta(a/2; k, n − k + 1),    high = Beta(1 − a/2; k + 1, n − k),    a = 1 − confidence

    Where trials went on until the k-th success, the last trial could not have failed, so the upper end is that of
    k − 1 successes in n − 1 trials. With both rules the interval is exact for trials that end with the k-th success or
    when a budget is used up.

    Args:
        successes (`int`): k.
        trials (`int`): n, above 0.
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
