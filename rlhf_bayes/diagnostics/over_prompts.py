"""A mean over prompts with its uncertainty, as it is computed, printed and explained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student
from torch import Tensor

from rlhf_bayes.numerics.jackknife import NUM_GROUPS
from rlhf_bayes.numerics.proportions import clustered_proportion

NOT_TRUSTWORTHY = "not trustworthy"
CONFIDENCE = 0.95
MIN_PROMPTS = 5
"""With fewer prompts an interval is printed instead of a standard error, since ± 2 of these would be too short."""
ANYTHING = (-math.inf, math.inf)
NOT_NEGATIVE = (0.0, math.inf)
SHARE = (0.0, 1.0)


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, with two kinds of doubt. `trustworthy` is false where no number here means anything."""

    mean: float
    standard_error: float
    """Standard error for prompts like these: from the variance between prompts, which contains that of the draws. With
    one prompt it is the error of its draws alone; nan where that is not known."""
    low: float
    """Lower end of the 95% confidence interval: from Student's t with one degree of freedom fewer than prompts, and
    for a share from [`~rlhf_bayes.numerics.clustered_proportion`]. nan where the standard error is."""
    high: float
    """Upper end of the interval."""
    draws_standard_error: float
    """Standard error for these very prompts, which falls with more completions; nan where it is not known."""
    trustworthy: bool = True
    prompts: int | None = None
    """Number of prompts, where it is known."""
    is_share: bool = False
    """Whether it is a share of completions."""
    at_least: float | None = None
    """A lower bound at 95% confidence for these prompts, where the mean cannot be trusted but a bound is known."""
    at_most: float | None = None
    """An upper bound of the same kind."""

    @property
    def shown_as_interval(self) -> bool:
        """Whether the interval is printed in the place of a standard error: for shares, and with few prompts."""
        return self.is_share or (self.prompts is not None and 1 < self.prompts < MIN_PROMPTS)

    def __str__(self) -> str:
        if not self.trustworthy:
            return self._bounds() or NOT_TRUSTWORTHY
        if math.isinf(self.mean):
            return "∞" if self.mean > 0 else "−∞"
        digits = 2 if not self.standard_error < 0.01 else 3
        mean = f"{self.mean:.{digits}f}"
        if self.shown_as_interval and math.isfinite(self.low):
            ends = (f"{end + 0.0:.{digits}f}" for end in (self.low, self.high))
            return f"{mean} [{', '.join(ends)}]".replace("-", "−")
        if math.isnan(self.standard_error):
            return mean
        return f"{mean} ± {self.standard_error:.{digits}f}"

    def _bounds(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:.2f} to {self.at_most:.2f}".replace("-", "−")
        if self.at_least is not None:
            return f"≥ {self.at_least:.2f}".replace("-", "−")
        return "" if self.at_most is None else f"≤ {self.at_most:.2f}".replace("-", "−")


def explanation(estimates: Sequence[Estimate]) -> str:
    """What ±, [low, high] and ≥ mean in a table of these estimates, in one or two sentences."""
    shown = [estimate for estimate in estimates if estimate.trustworthy]
    counts = {estimate.prompts for estimate in estimates if estimate.prompts is not None}
    parts = []
    if any(" ± " in str(estimate) for estimate in shown):
        of = "of the draws of the one prompt" if counts == {1} else "over prompts"
        parts.append(f"± standard error {of}")
    if any("[" in str(estimate) for estimate in shown):
        why = " (two to four prompts have too few for ±)" if any(1 < count < MIN_PROMPTS for count in counts) else ""
        parts.append(f"[low, high] 95% interval{why}")
    if any(estimate._bounds() for estimate in estimates if not estimate.trustworthy):
        parts.append("≥, ≤ bounds at 95% where the draws allow no estimate")
    text = "; ".join(parts) + "." if parts else ""
    return text + " One prompt says nothing of other prompts." if counts == {1} else text


def over_prompts(
    values: Tensor,
    variances: Tensor | None = None,
    trustworthy: bool = True,
    support: tuple[float, float] = ANYTHING,
    share_of: int | None = None,
) -> Estimate:
    """
    The mean over prompts of one number per prompt, with an interval clustered by prompt.

    Args:
        values (`Tensor` (P,)):
            Estimates for each prompt.
        variances (`Tensor` (P,), *optional*):
            The variance of each estimate over its draws.
        trustworthy (`bool`):
            Whether the mean can be trusted.
        support (`tuple[float, float]`):
            The least and the largest value that the number can have. The interval does not go beyond them.
        share_of (`int`, *optional*):
            For a share: the number of completions of each prompt.
    """
    prompts, mean = len(values), values.mean().item()
    draws_error = math.nan if variances is None else math.sqrt(variances.sum().item()) / prompts
    error = (values.std() / math.sqrt(prompts)).item() if prompts > 1 else draws_error
    is_share = share_of is not None
    if share_of is not None and math.isfinite(mean):
        low, high = clustered_proportion(values.tolist(), share_of, CONFIDENCE)
    else:
        half = quantile(prompts) * error
        # an estimate without bias may itself lie outside
        low, high = max(mean - half, min(support[0], mean)), min(mean + half, max(support[1], mean))
        if math.isnan(half):
            low = high = math.nan
    return Estimate(mean, error, low, high, draws_error, trustworthy, prompts, is_share)


def quantile(prompts: int, confidence: float = CONFIDENCE) -> float:
    """Student's quantile for the half-width of an interval over that many prompts."""
    # with one prompt the error is the jackknife's, whose degrees of freedom come from its groups
    return float(student.ppf((1 + confidence) / 2, (prompts if prompts > 1 else NUM_GROUPS) - 1))
