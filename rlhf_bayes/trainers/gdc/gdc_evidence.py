"""What [`GDCTrainer`] takes as evidence, and what it refuses."""

from typing import Any

from rlhf_bayes.likelihoods import Likelihood
from rlhf_bayes.objectives.gdc_losses import infinite_where_forbidden, names_that_take_forbidden
from rlhf_bayes.trainers.gdc.gdc_config import GDCConfig
from rlhf_bayes.trainers.rollout.reward_funcs import forbids

_DEFAULT_BETA = 0.05  # TRL's


def beta_of(args: GDCConfig, likelihood: Likelihood | None) -> float:
    """Units of reward per nat of evidence; a likelihood is in nats."""
    if likelihood is not None:
        return 1.0
    return _DEFAULT_BETA if args.beta is None else args.beta


def check_evidence(args: GDCConfig, reward_funcs: Any, likelihood: Any) -> None:
    """
    Refuse evidence that is missing, given twice, or that the divergence cannot take.

    Raises:
        ValueError, TypeError: the argument, the rule, and what to pass.
    """
    if (likelihood is None) == (reward_funcs is None):
        got = "neither" if likelihood is None else "both"
        raise ValueError(
            f"One of `reward_funcs` and `likelihood` must be given, got {got}. A likelihood is the whole evidence; to "
            "add a reward to it, use `posterior.tilt(reward_funcs, beta).likelihood`."
        )
    if args.beta_init is not None and args.beta_init <= beta_of(args, likelihood):
        raise ValueError(
            f"`beta_init` must be above `beta` = {beta_of(args, likelihood)}, got {args.beta_init}: annealing goes "
            "from a posterior nearer to the prior to the one asked for. Raise it, or leave it out."
        )
    if likelihood is None:
        return
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"`likelihood` must have a method `log_likelihood`, got {type(likelihood).__name__}. Pass "
            "`posterior.likelihood`, or rewards as `reward_funcs`."
        )
    for name in ("beta", "reward_weights", "reward_clip_range", "missing_eos_penalty"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"`{name}` must be left out with `likelihood`, got {getattr(args, name)}: it belongs to rewards, and "
                "a likelihood is in nats. Say it where the posterior is made."
            )
    if infinite_where_forbidden(args.divergence, args.alpha) and forbids(likelihood):
        alpha = "" if args.alpha is None else f" with `alpha`={args.alpha:g}"
        raise ValueError(
            f"`divergence` must not be {args.divergence!r}{alpha} for a likelihood that forbids "
            "completions: it is infinite for any policy that can draw one, and has no gradient. Use "
            f"{names_that_take_forbidden()}."
        )
