"""What [`GDCTrainer`] takes as evidence, and what it refuses."""

from typing import Any

from transformers import TrainerState

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


def power_of_evidence(args: GDCConfig, beta: float, state: TrainerState) -> float:
    """β/β_t in (0, 1], where β_t goes geometrically from `beta_init` to β."""
    if args.beta_init is None:
        return 1.0
    steps = args.beta_init_steps or max(1, state.max_steps // 2)
    return (beta / args.beta_init) ** (1.0 - min(1.0, state.global_step / steps))


def check_same_beta(beta: float, saved: float) -> None:
    """
    Refuse to go on from a checkpoint of another target.

    Raises:
        ValueError: if its β differs.
    """
    if beta != saved:
        raise ValueError(
            f"`beta` must be that of the checkpoint, {saved}, got {beta}: Z and what was drawn belong to the target "
            "of before. Resume with it, or start from the weights of the checkpoint: pass the folder as the model, "
            "and the prior as `ref_model`."
        )


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
