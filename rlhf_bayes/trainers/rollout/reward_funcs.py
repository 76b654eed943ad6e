"""The reward functions of a trainer, in the form in which TRL calls them."""

from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from rlhf_bayes.likelihoods import Likelihood, checked_evidence
from rlhf_bayes.lm.pretrained import whole_weights
from rlhf_bayes.rewards import checked, load_reward
from rlhf_bayes.rewards.scoring import PASSED_BY_TRL
from rlhf_bayes.trainers.rollout.shared_rewards import PolicyBase, SharedReward


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
