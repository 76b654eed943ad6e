"""The losses that GDC can minimise, one record each: the f-divergences, and the log-variance loss."""

from dataclasses import dataclass

from rlhf_bayes.numerics.f_divergence import DIVERGENCES, divergence_of, finite_where_forbidden

LOG_VARIANCE = "log_variance"


@dataclass(frozen=True)
class GDCLoss:
    """A choice of `divergence` in [`GDCConfig`]."""

    help: str
    """One line for `--help` and for the table of docs/control.md."""
    has_pseudo_reward: bool
    """Whether it is an f-divergence, so that it has a pseudo-reward, and `baseline` and `max_pseudo_reward` apply."""


GDC_LOSSES: dict[str, GDCLoss] = {
    **{name: GDCLoss(record.help, has_pseudo_reward=True) for name, record in DIVERGENCES.items()},
    LOG_VARIANCE: GDCLoss(
        "variance of log π − log π0 − log-likelihood over a prompt's completions, whatever drew them",
        has_pseudo_reward=False,
    ),
}
"""Name -> record. An f-divergence comes from [`~rlhf_bayes.numerics.DIVERGENCES`]: add it there."""


def infinite_where_forbidden(divergence: str, alpha: float | None = None) -> bool:
    """
    Whether the loss is infinite for a policy that can draw a completion which the evidence forbids.

    Args:
        divergence (`str`): one of `GDC_LOSSES`.
        alpha (`float`, *optional*): α of a family of f-divergences.

    Raises:
        ValueError: if the name is unknown, or α does not fit it.
    """
    return divergence != LOG_VARIANCE and divergence_of(divergence, alpha).infinite_where_forbidden


def names_that_take_forbidden() -> str:
    """The choices of `divergence` that can take forbidden completions, for error messages."""
    return ", ".join([*finite_where_forbidden(), f"or '{LOG_VARIANCE}'"])
