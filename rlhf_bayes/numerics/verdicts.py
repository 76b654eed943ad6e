"""Verdicts on a statement from a number and its standard error: agrees, disagrees, or cannot tell."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

AGREES, DISAGREES, CANNOT_TELL = "agrees", "disagrees", "cannot tell"
_CONFIDENCE = 0.95


class Measured(NamedTuple):
    """A mean with its standard error."""

    mean: float
    standard_error: float
    """0 for an exact number, nan for a single value of a random one."""
    freedom: float = math.inf
    """Degrees of freedom of the standard error; infinite where it is known."""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval, by Student's t; nan where the error is not known."""
        if self.standard_error == 0:
            return self.mean, self.mean
        tail = (1 + _CONFIDENCE) / 2
        quantile = norm.ppf(tail) if math.isinf(self.freedom) else student.ppf(tail, self.freedom)
        half = float(quantile) * self.standard_error
        return self.mean - half, self.mean + half


def measured(values: Sequence[float]) -> Measured:
    """
    The mean of independent values, one for each seed, and its standard error from their variance.

    Args:
        values (`Sequence[float]`):
            N values in the same unit.

    Returns:
        [`Measured`], in the unit of the values, with N − 1 degrees of freedom. The error of a single value is nan.

    Raises:
        ValueError: if there are none.
    """
    if len(values) == 0:
        raise ValueError("`values` must hold at least one number, got none.")
    found = np.asarray(values, dtype=float)
    if len(found) == 1:
        return Measured(float(found[0]), math.nan, 0)
    return Measured(float(found.mean()), float(found.std(ddof=1) / math.sqrt(len(found))), len(found) - 1)


def verdict(quantity: Measured, low: float = -math.inf, high: float = math.inf) -> str:
    """
    Whether a quantity lies between two bounds, as a statement says.

        "agrees":       its whole 95% interval lies in (low, high), the bounds excluded: 0 is not above 0
        "disagrees":    its whole 95% interval lies outside
        "cannot tell":  the interval contains a bound, or is not known

    "The two are equal" is a statement with two bounds, the largest differences that would not matter. An interval
    that contains 0 does not show that they are equal.

    Args:
        quantity ([`Measured`]):
            The quantity. With a standard error of 0 it is exact.
        low (`float`, *optional*):
            Lower bound, in the unit of the quantity.
        high (`float`, *optional*):
            Upper bound.

    Returns:
        `str`: `"agrees"`, `"disagrees"` or `"cannot tell"`.

    Raises:
        ValueError: if `low` is not below `high`, or both are infinite: every number would agree.
    """
    if not low < high or (math.isinf(low) and math.isinf(high)):
        raise ValueError(f"`low` must be below `high`, and one of them finite, got {low} and {high}.")
    least, greatest = quantity.interval
    if low < least and greatest < high:
        return AGREES
    if greatest <= low or high <= least:
        return DISAGREES
    return CANNOT_TELL


def verdict_of_all(verdicts: Iterable[str]) -> str:
    """
    The verdict on a claim that consists of several statements.

    It disagrees if one of them does, and agrees if all of them do. Without statements it cannot tell.

    Args:
        verdicts (`Iterable[str]`):
            One for each statement.
    """
    found = set(verdicts)
    if DISAGREES in found:
        return DISAGREES
    return AGREES if found == {AGREES} else CANNOT_TELL
