"""Adds the members of a reward ensemble to the model that is trained."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from rlhf_bayes.lm.adapters import check_can_be_read_again, check_leaves_base
from rlhf_bayes.rewards.loading import is_head, load_config
from rlhf_bayes.trainers.reward.reward_config import RewardConfig

HEADS = ("score", "classifier")


def member_names(num_members: int) -> list[str]:
    """Names of LoRA members: PEFT saves "default" at the root of a folder, and the others in subfolders."""
    return ["default", *(f"member_{index}" for index in range(1, num_members))]


def config_of(model: str | nn.Module, args: RewardConfig) -> Any:
    """The config of a model, or of the path that one will be loaded from."""
    if not isinstance(model, str):
        return model.config
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    return load_config(model, **{name: options[name] for name in ("revision", "trust_remote_code") if name in options})


def check_adapter_config(name: str, config: PeftConfig) -> None:
    """
    Refuse adapters that would be saved without the head: the base that they are later loaded on has a random one.

    Args:
        name (`str`): Name of the config in errors.
        config (`PeftConfig`): Configuration of the adapter.

    Raises:
        `ValueError`: if the task is not sequence classification, `modules_to_save` has no head without a task, or the
            initialisation cannot be repeated when the adapter is read.
    """
    check_can_be_read_again(config, f"`{name}`")
    saved = getattr(config, "modules_to_save", None) or ()
    if config.task_type == TaskType.SEQ_CLS or (config.task_type is None and any(map(is_head, saved))):
        return
    raise ValueError(
        f"`{name}` must train and save the classification head beside the adapter, got "
        f"`task_type={config.task_type and str(config.task_type)!r}` and `modules_to_save={list(saved) or None}`: the "
        "saved adapter would be read with another head than it was trained with. Set `task_type='SEQ_CLS'`."
    )


def check_saved_head(model: nn.Module) -> None:
    """
    Refuse a PEFT model that is saved without its head; see [`check_adapter_config`].

    Raises:
        `ValueError`: if PEFT keeps the head frozen, or does not know its name.
    """
    if not isinstance(model, PeftModel):
        return
    check_adapter_config("peft_config of the model", model.active_peft_config)
    if not any(
        parameter.requires_grad and ".modules_to_save." in name and is_head(name)
        for name, parameter in model.named_parameters()
    ):
        raise ValueError(
            "A PeftModel must train and save its classification head, got one whose head PEFT keeps frozen, or has no "
            f"name for ({type(model.get_base_model()).__name__}). Set `modules_to_save` in `peft_config` to the name "
            "of the head, and load an adapter with `is_trainable=True`."
        )


def widen_head(model: nn.Module, num_members: int, seed: int) -> None:
    """
    Give a classifier of one label K labels, one for each member. The first keeps its weights, the others are random.

    Raises:
        `ValueError`: if the model has no linear head `score` or `classifier`, or it is frozen.
    """
    places = list(_heads(model))
    if not any(owner._modules[name].weight.requires_grad for owner, name in places):
        raise ValueError(
            "`num_members` with `ensemble='heads'` needs a head that learns, got one whose weights are frozen. Set "
            "`requires_grad` of its weights."
        )
    first = places[0][0]._modules[places[0][1]]
    rows = _initial_weights((num_members - 1, first.in_features), model, torch.Generator().manual_seed(seed))
    for owner, name in places:
        head = owner._modules[name]
        wide = nn.Linear(head.in_features, num_members, bias=head.bias is not None).to(head.weight)
        with torch.no_grad(), _gathered(head):
            wide.weight.copy_(torch.cat([head.weight, rows.to(head.weight)]))
            if head.bias is not None:
                wide.bias.copy_(head.bias.expand(num_members))
        owner._modules[name] = wide.requires_grad_(head.weight.requires_grad)
    model.config.num_labels = num_members


def add_adapters(model: nn.Module, num_members: int, seed: int) -> list[str]:
    """
    Add LoRA adapters to a PEFT model with one, so that each of K members has weights and a head of its own.

    Returns:
        `list[str]`: the names of the adapters.

    Raises:
        `ValueError`: if the model has no adapter, or several, or one whose initialisation changes the base.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"`ensemble='lora'` needs a `peft_config`, or a PeftModel, got {type(model).__name__}. Pass "
            "`peft_config=LoraConfig(task_type='SEQ_CLS')`, or set `ensemble='heads'`."
        )
    if list(model.peft_config) != ["default"]:
        raise ValueError(
            "`ensemble='lora'` needs a PeftModel with one adapter, named 'default', the others being added to it; got "
            f"{', '.join(model.peft_config)}. Pass the base model and a `peft_config`."
        )
    config = model.peft_config["default"]
    check_leaves_base(config, "the members of `ensemble='lora'`")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = member_names(num_members)
    for index, name in enumerate(names[1:], start=1):
        with torch.random.fork_rng():
            torch.manual_seed(seed + index)
            model.add_adapter(name, copy.deepcopy(config))
    model.set_adapter("default")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        member = next((member for member in names[1:] if f".{member}." in name), None)
        first = trained.get(name if member is None else name.replace(f".{member}.", ".default."))
        # `set_adapter` has frozen all adapters but the active one
        parameter.requires_grad_(first is not None)
        if member is None or first is None:
            continue
        parameter.data = parameter.data.to(first.dtype)
        if ".modules_to_save." in name and parameter.dim() == 2:
            # PEFT copies the head, so without this the members would start from the same one
            parameter.data.copy_(_initial_weights(parameter.shape, model, generator))
    return names


def _heads(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules that hold the model's head, with its name in each; several where PEFT keeps copies."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name = next((name for name in HEADS if hasattr(base, name)), "score")
    head = getattr(base, name, None)
    places = [(base, name)]
    if isinstance(head, ModulesToSaveWrapper):
        places = [(head, "original_module"), *((head.modules_to_save, adapter) for adapter in head.modules_to_save)]
    for owner, key in places:
        if not isinstance(owner._modules.get(key), nn.Linear):
            raise ValueError(
                "`num_members` with `ensemble='heads'` needs a model with a linear head named `score` or "
                f"`classifier`, got {type(base).__name__}. Set `ensemble='lora'`."
            )
        yield owner, key


def _gathered(module: nn.Module) -> AbstractContextManager:
    """A context in which the module's weights are whole, where ZeRO-3 shards them over processes."""
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))


def _initial_weights(shape: tuple[int, ...], model: nn.Module, generator: torch.Generator) -> Tensor:
    std = getattr(model.config, "initializer_range", None) or 0.02
    return (
        torch.randn(shape, generator=generator) * std
    )  # drawn on the CPU, so that they are the same for every device
