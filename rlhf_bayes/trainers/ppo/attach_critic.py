"""Creates the critic of a policy, and puts it inside the policy."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_bayes.lm import Critic
from rlhf_bayes.lm.adapters import base_causal_lm, plain_copy
from rlhf_bayes.lm.critic import CRITIC, critic_config, is_critic_folder, set_trainable
from rlhf_bayes.lm.merging import merged
from rlhf_bayes.lm.pretrained import is_adapter, load_causal_lm, load_trunk, task_of
from rlhf_bayes.lm.trunk import trunk_of
from rlhf_bayes.rewards.loading import load_classifier
from rlhf_bayes.trainers.rollout.prior_checks import check_not_moved, probe_if_whole


def attach_critic(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    value_model: "str | PreTrainedModel | None",
    reward_models: list[tuple[nn.Module, PreTrainedTokenizerBase]],
    seed: int,
    reads_images: bool = False,
) -> Critic:
    """
    Put a critic inside the policy's causal LM, so that DDP, FSDP and DeepSpeed see one module with one forward.

    Args:
        policy (`nn.Module`):
            The policy, PEFT-wrapped or not.
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's tokenizer.
        kind (`str`):
            `"shared"` or `"separate"`.
        value_model (`str` or `PreTrainedModel`, *optional*):
            A folder with a saved critic; with `"separate"` it may also be a model, or a path to one, whose trunk is
            used.
        reward_models (`list[tuple[nn.Module, PreTrainedTokenizerBase]]`):
            Reward models and their tokenizers: a separate critic copies the first one's trunk if there is no
            `value_model`.
        seed (`int`):
            Seed for the weights of a critic's adapter.
        reads_images (`bool`, *optional*, defaults to `False`):
            Whether prompts may have images, so that the critic needs a trunk of the policy's kind.

    Raises:
        ValueError: if `value_model` or the reward model does not fit `kind` or the policy.
    """
    lm = base_causal_lm(policy)
    hidden_size = lm.config.get_text_config().hidden_size
    saved = value_model if isinstance(value_model, str) and is_critic_folder(value_model) else None
    if kind == "shared":
        if value_model is not None and (saved is None or critic_config(saved)["trunk"] != "shared"):
            raise ValueError(
                f"`value_model` must be a folder with a shared critic when `critic='shared'`, got "
                f"{_described(value_model)}. Set `critic='separate'` to give the critic a trunk of its own."
            )
        critic = Critic(hidden_size)
    else:
        critic = _separate_critic(policy, tokenizer, value_model, saved, reward_models, seed)
        if reads_images and critic.backbone is not None and type(critic.backbone) is not type(trunk_of(lm)):
            raise ValueError(
                f"The critic's trunk must read images as the policy's does, a {type(trunk_of(lm)).__name__}, got "
                f"{_described(critic.backbone)}. Pass a `value_model` of the policy's kind, or set `critic='shared'`."
            )
    if saved is not None:
        critic.load(saved)
    critic.to(lm.device)
    lm.add_module(CRITIC, critic)
    set_trainable(lm, critic)
    return critic


def _separate_critic(policy, tokenizer, value_model, saved, reward_models, seed) -> Critic:
    lm = base_causal_lm(policy)
    if saved is not None:
        config = critic_config(saved)
        if config["trunk"] == "backbone":
            return Critic.from_pretrained(saved)
        raise ValueError(
            f"`value_model` must be a critic with a trunk of its own when `critic='separate'`, got a "
            f"{config['trunk']} one in `{saved}`, which only works inside the policy that it was saved with. Resume "
            "from that checkpoint, or leave `value_model` out."
        )
    if value_model is not None:
        trunk = _loaded_trunk(value_model, lm.dtype) if isinstance(value_model, str) else value_model.base_model
    elif hasattr(policy, "peft_config"):
        return _adapter_critic(policy, seed)
    elif reward_models:
        reward_model, reward_tokenizer = reward_models[0]
        trunk = reward_model.base_model
        if reward_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"The critic's trunk must share the policy's tokenizer, but that of the reward model "
                f"{_described(reward_model)} has another vocabulary: the critic reads the policy's token ids. Pass a "
                "`value_model` with the policy's tokenizer, or set `critic='shared'`."
            )
    else:
        trunk = trunk_of(lm)
    sizes = [model.config.get_text_config().vocab_size for model in (lm, trunk)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The critic's trunk must share the policy's vocabulary of {sizes[0]} tokens, got {sizes[1]} from "
            f"{_described(trunk)}: it reads the policy's token ids. Pass a `value_model` with the policy's tokenizer, "
            "or set `critic='shared'`."
        )
    return Critic(trunk.config.get_text_config().hidden_size, backbone=copy.deepcopy(trunk))


def _loaded_trunk(path: str, dtype: torch.dtype) -> nn.Module:
    if not is_adapter(path):
        return load_trunk(path, dtype)
    model = load_classifier(path) if task_of(path) == "SEQ_CLS" else load_causal_lm(path)
    return merged(model).base_model.to(dtype)


def _adapter_critic(policy, seed: int) -> Critic:
    config = plain_copy(policy.peft_config[policy.active_adapter])
    if config.peft_type.value != "LORA":
        raise ValueError(
            f"`critic='separate'` on a PEFT policy needs LoRA, got {config.peft_type.value}: other adapters cannot "
            "share one forward with the policy's. Set `critic='shared'`, or pass `value_model`."
        )
    # RLOO seeds each process differently, and FSDP would combine the adapter from parts of different draws
    before = probe_if_whole(policy)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.add_adapter(CRITIC, config)
    check_not_moved(policy, before, "the critic's adapter was made")
    return Critic(policy.get_base_model().config.get_text_config().hidden_size, adapter=CRITIC)


def _described(model) -> str:
    return f"`{model}`" if isinstance(model, str) else type(model).__name__
