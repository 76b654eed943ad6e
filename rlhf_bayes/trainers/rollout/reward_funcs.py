"""The reward functions of a trainer, in the form in which TRL calls them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from rlhf_bayes.likelihoods import Likelihood, checked_evidence
from rlhf_bayes.likelihoods.likelihood import known_prefixes, prefix_log_likelihood
from rlhf_bayes.lm.pretrained import whole_weights
from rlhf_bayes.rewards import RewardModel, checked, load_reward
from rlhf_bayes.rewards.prefix_rewards import takes_prefixes_of
from rlhf_bayes.rewards.scoring import PASSED_BY_TRL
from rlhf_bayes.rewards.validation import callable_name
from rlhf_bayes.trainers.faults.reward_retries import retried
from rlhf_bayes.trainers.rollout.shared_rewards import PolicyBase, SharedReward

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer


def checked_reward_funcs(
    reward_funcs: Any,
    tokenizers: Any,
    device: torch.device,
    base: PolicyBase | None = None,
) -> list:
    """
    Reward functions whose results are checked; those given by a path are loaded.

    They are loaded here since TRL would read the weights without the normalization beside them. Adapters on the
    policy's base are loaded later, when the policy is: see [`share_base`]. A reward may be `-inf`, for a forbidden
    completion.

    Args:
        reward_funcs, tokenizers:
            `reward_funcs` and `reward_processing_classes` of the trainer.
        device (`torch.device`):
            The device of models that are loaded.
        base ([`PolicyBase`], *optional*):
            The base of a policy with LoRA.

    Raises:
        ValueError: if there is no function, or another number of tokenizers than of functions.
    """
    funcs = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
    if not funcs:
        raise ValueError("`reward_funcs` must hold at least one reward function, got an empty list. Pass one.")
    paths = [number for number, func in enumerate(funcs) if isinstance(func, (str, Path))]
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers]
    if tokenizers == [None]:
        tokenizers = [None] * len(funcs)
    if paths and len(tokenizers) != len(funcs):
        raise ValueError(
            f"`reward_processing_classes` must hold one tokenizer for each of the {len(funcs)} reward functions, got "
            f"{len(tokenizers)}. Put None where the function needs none."
        )
    with whole_weights():
        for number in paths:
            if base is not None and base.carries(funcs[number]):
                funcs[number] = SharedReward(funcs[number], tokenizers[number], device, number, base)
            else:
                funcs[number] = load_reward(funcs[number], tokenizers[number], device)
    return [checked(func, allow_forbidden=True) for func in funcs]


@final
class LikelihoodReward:
    """
    A likelihood as a reward function that TRL calls. Rewards are nats, `-inf` where a completion is forbidden.

    Args:
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`]):
            The evidence.

    Attributes:
        features (`dict[str, Tensor]`): features of the last completions, name -> (B,).
    """

    __name__ = "log_likelihood"

    def __init__(self, likelihood: Likelihood):
        self.likelihood = likelihood
        self.features: dict[str, Tensor] = {}

    def __call__(self, prompts: list, completions: list, completion_ids: list, **columns: Any) -> list[float]:
        columns = {name: values for name, values in columns.items() if name not in PASSED_BY_TRL}
        evidence = checked_evidence(self.likelihood, prompts, completions, completion_ids, columns)
        self.features = evidence.features
        return evidence.log_likelihood.tolist()

    @property
    def takes_prefixes(self) -> bool:
        """As of the likelihood."""
        return known_prefixes(self.likelihood)

    def of_prefixes(
        self, prompts: list, completions: list, completion_ids: list, *, whole: bool = False, **columns: Any
    ) -> list[float | None]:
        """
        The evidence of prefixes, nats; None where there is none.

        Args:
            prompts, completions, completion_ids, columns: As in TRL's protocol, with prefixes for completions.
            whole (`bool`): Whether all of the evidence is meant, rather than the part that takes prefixes.
        """
        ask = self.likelihood.log_likelihood if whole else functools.partial(prefix_log_likelihood, self.likelihood)
        nats = ask(prompts, completions, completion_ids, columns)  # (N,)
        return [None if value != value else value for value in nats.tolist()]


def functions_of_prefixes(trainer: "RolloutTrainer", asked: bool | None) -> dict[int, Callable]:
    """
    What is called for the rewards of prefixes: number of a reward function -> function of TRL's protocol.

    Args:
        trainer (`RolloutTrainer`):
            Its reward functions are loaded and prepared.
        asked (`bool`, *optional*):
            `prefix_rewards` of the configuration: True for all, False for none, None for those that say so, models
            that read all prefixes of a text in one pass among them.

    Raises:
        ValueError: if it is True, and a model cannot be asked since its weights are sharded.
    """
    found: dict[int, Callable] = {}
    for number, func in enumerate([] if asked is False else trainer.reward_funcs):
        source: Any = getattr(func, "__wrapped__", func)
        is_module = isinstance(func, nn.Module)
        if trainer.sharded and (is_module or isinstance(source, SharedReward)):
            if asked:
                raise ValueError(
                    f"`prefix_rewards` must be left out with the reward model '{callable_name(source)}' under ZeRO or "
                    "FSDP, which shard it, got True: processes would run it different numbers of times, and wait for "
                    "one another. Leave it out."
                )
            continue
        if is_module:
            source = _as_reward_model(trainer, number)
        if source is None or not (asked or takes_prefixes_of(source)):
            continue
        if isinstance(source, LikelihoodReward):
            call = functools.partial(source.of_prefixes, whole=asked is True)
        elif is_module:
            call = source
        else:
            found[number] = func
            continue
        args, failures = trainer.args, trainer.reward_failures
        found[number] = retried(checked(call, True), args.reward_timeout, args.reward_retries, failures.errors)
    return found


def _as_reward_model(trainer: "RolloutTrainer", number: int) -> RewardModel | None:
    """A module among the reward functions, which TRL runs itself, as one that texts are given to."""
    tokenizers: Any = trainer.reward_processing_classes
    module, tokenizer = trainer.accelerator.unwrap_model(trainer.reward_funcs[number]), tokenizers[number]
    if tokenizer is None or trainer.reads_images:
        return None
    was_training = module.training  # the caller decides whether the module drops out
    model = RewardModel(module, tokenizer)
    module.train(was_training)
    return model
