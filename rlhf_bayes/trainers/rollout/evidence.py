"""The evidence of a trainer, rewards with a β or a likelihood in nats, and the checks of it."""

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_bayes.likelihoods import Likelihood, known_forbids
from rlhf_bayes.objectives.gdc_losses import names_that_take_forbidden
from rlhf_bayes.trainers.rollout.reward_funcs import LikelihoodReward, checked_reward_funcs
from rlhf_bayes.trainers.rollout.rollout_config import RolloutConfig
from rlhf_bayes.trainers.rollout.shared_rewards import PolicyBase

_DEFAULT_BETA = 0.05
"""TRL's default β, for a configuration whose `beta` is None."""
_OF_REWARDS = "it belongs to rewards, and a likelihood is in nats. Say it where the posterior is made."
_KNOBS = dict.fromkeys(("beta", "reward_weights", "reward_clip_range", "missing_eos_penalty"), _OF_REWARDS) | {
    "target_kl": "it adapts β, and the posterior of a likelihood is the one given, with no β to adapt. Say how much "
    "the evidence weighs where the posterior is made: by the β of a reward, or the power in a `ProductLikelihood`."
}
"""Field of a configuration -> why it must be left out with a likelihood."""
_TAKES_FORBIDDEN = f"`GDCTrainer` can take it, with `divergence` {names_that_take_forbidden()}"


def beta_of(args: RolloutConfig, likelihood: Likelihood | None) -> float:
    """Units of reward per nat of evidence; 1 for a likelihood, which is in nats."""
    if likelihood is not None:
        return 1.0
    return _DEFAULT_BETA if args.beta is None else args.beta


def check_evidence(args: RolloutConfig, reward_funcs: Any, likelihood: Any, tokenizers: Any = None) -> None:
    """
    Refuse evidence that is missing, given twice, or unsuitable for the objective. This loads nothing.

    Args:
        args ([`RolloutConfig`]):
            The trainer's configuration.
        reward_funcs, likelihood, tokenizers:
            The trainer's `reward_funcs`, `likelihood` and `reward_processing_classes`.

    Raises:
        ValueError, TypeError: the argument, the rule, and what to pass.
    """
    if (likelihood is None) == (reward_funcs is None):
        got = "neither" if likelihood is None else "both"
        raise ValueError(
            f"One of `reward_funcs` and `likelihood` must be given, got {got}. A likelihood is the whole evidence; to "
            "add a reward to it, use `posterior.tilt(reward_funcs, beta).likelihood`."
        )
    if likelihood is None:
        return
    if isinstance(likelihood, type) or not isinstance(likelihood, Likelihood):
        got = f"the class {likelihood.__name__}" if isinstance(likelihood, type) else type(likelihood).__name__
        raise TypeError(
            f"`likelihood` must be an object with a method `log_likelihood`, got {got}. Pass `posterior.likelihood`, "
            "or rewards as `reward_funcs`."
        )
    if tokenizers is not None:
        raise ValueError(
            "`reward_processing_classes` must be left out with `likelihood`: it belongs to reward models, and a "
            "likelihood has its own tokenizers. Leave it out."
        )
    fields = type(args).__dataclass_fields__
    for name, reason in _KNOBS.items():
        if name in fields and getattr(args, name) != fields[name].default:
            raise ValueError(f"`{name}` must be left out with `likelihood`, got {getattr(args, name)}: {reason}")
    objective = args.infinite_where_forbidden
    if objective is not None and known_forbids(likelihood):
        raise ValueError(
            f"`likelihood` must not forbid completions with {objective}, got {type(likelihood).__name__} with "
            "`forbids` = True: the objective is infinite for any policy that can draw a forbidden completion, and has "
            f"no gradient. {_TAKES_FORBIDDEN}."
        )


def reward_funcs_of(
    likelihood: Likelihood | None, reward_funcs: Any, tokenizers: Any, device: torch.device, base: PolicyBase | None
) -> list:
    """
    The evidence as a list of reward functions, as TRL calls them.

    A likelihood becomes one [`LikelihoodReward`]; reward functions are those of [`checked_reward_funcs`]. Either may
    return `-inf`, which [`unusable_rewards`] refuses for objectives that cannot take it.

    Args:
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`], *optional*):
            The likelihood of the trainer, instead of reward functions.
        reward_funcs, tokenizers, device, base:
            As in [`checked_reward_funcs`].
    """
    if likelihood is not None:
        return [LikelihoodReward(likelihood)]
    return checked_reward_funcs(reward_funcs, tokenizers, device, base)


def unusable_rewards(
    rewards: Tensor, reward_funcs: list, names: list[str], infinite_where_forbidden: str | None
) -> list[Exception]:
    """
    Errors for rewards of a rollout that cannot be used. All processes see the same rewards, and so the same errors.

    Args:
        rewards (`Tensor` (B, F)):
            Rewards of all processes; nan for None, `-inf` where a completion is forbidden.
        reward_funcs (`list`):
            The F functions and models, as the trainer calls them.
        names (`list[str]`):
            The names of these F functions.
        infinite_where_forbidden (`str`, *optional*):
            The objective, if it is infinite where a completion is forbidden: see [`RolloutConfig`].
    """
    errors: list[Exception] = []
    for column, func, name in zip(rewards.T, reward_funcs, names, strict=True):
        if isinstance(func, nn.Module) and not column.isfinite().all():
            errors.append(
                ValueError(
                    f"Reward model `{name}` must return finite rewards, got {column.tolist()}. Its weights or its "
                    "precision are broken; try it in float32 on the completions above."
                )
            )
        elif infinite_where_forbidden is not None and (column == -torch.inf).any():
            source = getattr(func, "__wrapped__", func)
            errors.append(_forbidden_error(source, name, infinite_where_forbidden, column))
    return errors


def _forbidden_error(source: Any, name: str, objective: str, column: Tensor) -> ValueError:
    got = f"got -inf (a forbidden completion) for {int((column == -torch.inf).sum())} of {len(column)} completions"
    why = f"with {objective}, {got}: the objective is infinite for a policy that can draw one"
    if isinstance(source, LikelihoodReward):
        # in a product, the parts that may have returned −inf
        parts = getattr(source.likelihood, "likelihoods", [source.likelihood])
        silent = " or ".join(sorted({type(part).__name__ for part in parts if not known_forbids(part)}))
        return ValueError(
            f"The log-likelihood of {silent} must be finite {why}. If it is meant to forbid, set its attribute "
            f"`forbids` to True: this is then refused before the model loads. {_TAKES_FORBIDDEN}. If not, return a "
            "large negative number of nats instead."
        )
    return ValueError(
        f"The reward function '{name}' must return finite rewards {why}. Return a large finite penalty, or None where "
        f"the reward does not apply; {_TAKES_FORBIDDEN}."
    )
