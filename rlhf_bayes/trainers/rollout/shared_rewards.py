"""Reward models given by a path that are adapters on the policy's base: they are loaded into the policy."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from peft import PeftModel, PeftType
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_bayes.lm.adapters import base_causal_lm, rewrites_base, trains_biases
from rlhf_bayes.lm.pretrained import whole_weights
from rlhf_bayes.rewards import RewardEnsemble, RewardIndex, RewardModel, load_reward
from rlhf_bayes.rewards.loading import DEFAULT_ADAPTER, check_adapters, found_index, load_tokenizer
from rlhf_bayes.rewards.shared import CannotShareError, SharedClassifier, holds_weights_of, is_on_base

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class PolicyBase:
    """
    The base under a policy's LoRA adapters.

    Args:
        path (`str`):
            The path that the base was loaded from.
        revision (`str`, *optional*):
            The revision, for a repository of the hub.
        as_stored (`bool`):
            Whether its weights are certainly those at `path`: an instance may have been changed in memory, and some
            initialisations of LoRA change the base.
    """

    path: str
    revision: str | None
    as_stored: bool

    @classmethod
    def of(cls, model: Any, peft_config: Any, model_init_kwargs: dict[str, Any] | None) -> "PolicyBase | None":
        """The base in a trainer's arguments; None if the policy is trained without LoRA, or its base has no path."""
        if isinstance(model, PeftModel):
            peft_config = model.peft_config[model.active_adapter]
        # biases that learn would move under the reward models too
        if getattr(peft_config, "peft_type", None) != PeftType.LORA or trains_biases(peft_config):
            return None
        if isinstance(model, str):
            return cls(model, (model_init_kwargs or {}).get("revision"), not rewrites_base(peft_config))
        path = base_causal_lm(model).name_or_path
        return cls(path, None, False) if path else None

    def carries(self, folder: str | Path) -> bool:
        """Whether a folder holds a reward model, or an ensemble, of LoRA adapters on this base."""
        folder = Path(folder)
        return folder.is_dir() and is_on_base(folder, found_index(folder), self.path, self.revision)


@final
class SharedReward:
    """
    A reward model, or an ensemble, of adapters on the policy's base, so that no second base is loaded.

    Args:
        folder (`str` or `Path`):
            The folder in which it was saved.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer. Default: the one saved beside it.
        device (`torch.device`):
            The device of a separate base, which is loaded if the policy's base turns out to have other weights.
        number (`int`):
            Index among the trainer's reward functions.
        base ([`PolicyBase`]):
            The base of the policy.

    Attributes:
        reward ([`RewardModel`] or [`RewardEnsemble`]): the reward, after `attach` was called.

    Raises:
        ValueError: as [`RewardModel`] and [`RewardEnsemble.from_pretrained`].
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None,
        device: torch.device,
        number: int,
        base: PolicyBase,
    ):
        self.folder, self.device, self.number, self.base = Path(folder), device, number, base
        self.__name__ = self.folder.name
        self.index: RewardIndex = found_index(self.folder)
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(self.folder, self.__name__)
        kind = self.index.kind
        adapters = self.index.members if kind == "lora" else [DEFAULT_ADAPTER]
        check_adapters(self.folder, adapters, self.index.num_members if kind == "heads" else 1)
        self.reward: RewardModel | RewardEnsemble | None = None

    def attach(self, policy: Callable[[], nn.Module]) -> None:
        """Put the adapters into the policy that `policy` returns, or load a separate base for them."""
        try:
            if not (self.base.as_stored or holds_weights_of(policy(), self.base.path)):
                raise CannotShareError("the policy's base has other weights than those it was loaded from")
            classifier = SharedClassifier(self.folder, self.index, policy, self.number)
        except CannotShareError as error:
            logger.warning(f"The reward model in '{self.folder}' gets a base of its own: {error}.")
            self.reward = load_reward(self.folder, self.tokenizer, self.device)
            return
        self.reward = _reward(classifier, self.tokenizer, self.index, self.__name__)

    @property
    def takes_prefixes(self) -> bool:
        """As of the reward, once it is attached."""
        return self.reward is not None and self.reward.takes_prefixes

    def __call__(self, *args: Any, **kwargs: Any) -> list[float]:
        return self.reward(*args, **kwargs)


def share_base(reward_funcs: list, policy: Callable[[], nn.Module]) -> None:
    """
    Put the adapters of each [`SharedReward`] among checked reward functions into the policy.

    Call it before the critic is attached: PEFT freezes what it does not know.

    Args:
        reward_funcs (`list`):
            As [`checked_reward_funcs`] returns them.
        policy (`Callable[[], nn.Module]`):
            Returns the current policy; it is called at each scoring, since an engine may wrap the policy later.
    """
    with whole_weights():
        for func in reward_funcs:
            shared = getattr(func, "__wrapped__", None)
            if isinstance(shared, SharedReward):
                shared.attach(policy)


def _reward(
    classifier: SharedClassifier, tokenizer: PreTrainedTokenizerBase, index: RewardIndex, name: str
) -> RewardModel | RewardEnsemble:
    if index.kind == "single":
        reward = RewardModel(classifier, tokenizer, index=index)
    else:
        # members have the names of their adapters in the policy
        members = list(classifier.peft_config) if index.kind == "lora" else index.members
        index = RewardIndex(index.kind, members, index.append_eos, index.normalization)
        reward = RewardEnsemble(classifier, tokenizer, index=index)
    reward.__name__ = name
    return reward
