"""Checks of a trainer's input before a model is loaded."""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from torch import nn
from trl import RLOOConfig

from rlhf_bayes.lm.adapters import described
from rlhf_bayes.lm.forward import runs_plainly
from rlhf_bayes.store import CompletionStore

T = TypeVar("T")
Class = TypeVar("Class", bound=type)
_TURNS = ("tools", "environment_factory", "rollout_func")  # arguments of TRL's GRPOTrainer


def config_of(args: Any, config_class: type[T], model: Any, name: str) -> T:
    """
    A trainer's configuration: the given one, or the default with a folder named after the model, as in TRL.

    Args:
        args:
            The argument `args` of the trainer.
        config_class (`type`):
            The trainer's class of configurations.
        model (`str` or `PreTrainedModel`):
            The policy.
        name (`str`):
            Name of the objective, for the folder.

    Raises:
        TypeError: if `args` is of another class.
    """
    if args is None:
        path = model if isinstance(model, str) else model.config._name_or_path
        args = config_class(f"{path.split('/')[-1]}-{name}")
    if not isinstance(args, config_class):
        raise TypeError(
            f"`args` must be a {config_class.__name__}, got {type(args).__name__}. Replace the class name; every "
            f"field of RLOOConfig is one of {config_class.__name__}."
        )
    return args


def of_one_turn(cls: Class) -> Class:
    """
    Class decorator: a constructor refuses the arguments of [`~trl.GRPOTrainer`] for turns with an environment.

    It raises a TypeError that says what to do instead.
    """
    plain = cls.__init__

    @functools.wraps(plain)
    def __init__(self, *args, **kwargs):
        for name in _TURNS:
            if name in kwargs:
                raise TypeError(
                    f"`{name}` is no argument of {cls.__name__}: TRL's RLOOTrainer, which draws its completions, "
                    "draws them in one turn. For turns with a tool or an environment, write a loop like "
                    "`examples/plain_loop.py`, and give its rollouts a `policy_mask`: the objectives leave the "
                    "environment's tokens out."
                )
        plain(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def check_datasets(**datasets: Any) -> None:
    """
    Refuse datasets that no rollout can start from.

    Args:
        **datasets:
            Datasets by the name of the trainer's argument: a dataset, a mapping of several, or None.

    Raises:
        TypeError: if one is not of the `datasets` library.
        ValueError: if one is empty, lacks the column `prompt`, or holds a prompt that is empty or neither text nor
        chat.
    """
    for name, dataset in datasets.items():
        named = dataset.items() if isinstance(dataset, Mapping) else [(None, dataset)]
        for key, part in named:
            if part is not None:
                _check_dataset(name if key is None else f"{name}['{key}']", part)


def check_enough_prompts(args: RLOOConfig, train_dataset: Any) -> None:
    """
    Refuse a dataset that is too small for one rollout: TRL would drop the incomplete rollout and train 0 steps.

    Args:
        args ([`~trl.RLOOConfig`]):
            The trainer's configuration.
        train_dataset ([`~datasets.Dataset`]):
            The dataset. Others, for instance streams, are not checked.

    Raises:
        ValueError: if it holds fewer rows than a rollout has prompts.
    """
    if not isinstance(train_dataset, Dataset):
        return
    rows, prompts = len(train_dataset), args.generation_batch_size // args.num_generations
    if rows >= prompts:
        return
    raise ValueError(
        f"`train_dataset` must hold at least {prompts} rows, got {rows}: a rollout is of {args.generation_batch_size} "
        f"completions (`per_device_train_batch_size` × processes × `steps_per_generation`), `num_generations` = "
        f"{args.num_generations} of a row. Draw more of each, take smaller batches, or repeat the rows: "
        f"`concatenate_datasets([train_dataset] * {-(-prompts // rows)})`."
    )


def check_plain_passes(model: nn.Module, num_processes: int, engine: bool) -> None:
    """
    Refuse models that only plain passes compute where several processes, or an engine, would run them otherwise.

    Args:
        model (`nn.Module`):
            The policy: see [`~rlhf_bayes.lm.forward.runs_plainly`].
        num_processes (`int`):
            Of the training.
        engine (`bool`):
            Whether vLLM or continuous batching draws.

    Raises:
        ValueError: if the model is one of these, and either is the case.
    """
    if runs_plainly(model) and (engine or num_processes > 1):
        raise ValueError(
            f"{described(model)} must be trained in one process and without `use_vllm` or "
            f"`use_transformers_continuous_batching`, got {num_processes} processes: padding or a cache changes what "
            "it computes, so it is run in passes without them, whose number differs between processes. Train it in "
            "one process, or take LoRA on a model that knows masks and positions."
        )


def check_policy(model: Any, peft_config: Any) -> None:
    """
    Refuse policies of which nothing would be trained, or whose adapter TRL does not find.

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`): As given to the trainer.
        peft_config (`PeftConfig`, *optional*): Of an adapter that is still to be made.

    Raises:
        ValueError: if no weight is trainable, or the adapters of a PeftModel are named otherwise than `"default"`.
    """
    if isinstance(model, str) or peft_config is not None:
        return
    adapters = getattr(model, "peft_config", None)
    if adapters is not None and "default" not in adapters:
        raise ValueError(
            f"The trained adapter must be named 'default', got a PeftModel with {sorted(adapters)}: TRL copies "
            "the adapter of that name to be the prior. Load it without `adapter_name`: "
            "`PeftModel.from_pretrained(base, folder, is_trainable=True)`."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        way_out = (
            "Unfreeze some: `model.requires_grad_(True)`."
            if adapters is None
            else "Load the adapter with `PeftModel.from_pretrained(base, folder, is_trainable=True)`."
        )
        raise ValueError(
            f"`model` must have weights to train, got {type(model).__name__} with none: only the critic would learn, "
            f"and the policy stay the prior. {way_out}"
        )


def check_tokenizer(tokenizer: Any) -> None:
    """
    Refuse tokenizers under which no completion ends.

    Raises:
        ValueError: if it has no EOS token. A missing padding token is no trouble: EOS takes its place, as in TRL.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"`processing_class` must have an EOS token, got {type(tokenizer).__name__} with `eos_token=None`: no "
            "completion would ever end. Set `eos_token` to the token that closes a text in the model's training data."
        )


def _advice(columns: list[str]) -> str:
    text = next((name for name in columns if not name.endswith(("ids", "mask", "labels"))), None)
    if columns and text is None:
        return (
            "Prompts are texts or chats, which the trainer tokenises itself: "
            f"`dataset.map(lambda row: {{'prompt': tokenizer.decode(row['{columns[0]}'])}})`."
        )
    return f"Rename the column that holds prompts: `dataset.rename_column({text or 'text'!r}, 'prompt')`."


def _check_dataset(name: str, dataset: Any) -> None:
    if isinstance(dataset, CompletionStore):
        raise TypeError(
            f"`{name}` must be a dataset of prompts, got a CompletionStore: stored completions are learnt from by "
            "`GDCTrainer(train_dataset=store)`, with any `divergence`. PPO learns from its own policy's draws."
        )
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"`{name}` must be a Dataset or an IterableDataset, got {type(dataset).__name__}. Convert a list of rows: "
            "`datasets.Dataset.from_list(rows)`."
        )
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"`{name}` must have a column `prompt`, got {list(columns)}. {_advice(columns)}")
    if isinstance(dataset, IterableDataset):  # its rows are checked when they are read
        return
    if len(dataset) == 0:
        raise ValueError(
            f"`{name}` must hold at least one prompt, got none. Check the split and the filters before it."
        )
    for row, prompt in enumerate(dataset["prompt"]):
        is_chat = isinstance(prompt, list) and all(isinstance(message, Mapping) for message in prompt)
        if not prompt or not (isinstance(prompt, str) or is_chat):
            raise ValueError(
                f"`{name}` must hold texts or lists of chat messages in `prompt`, got {prompt!r} in row {row}. Drop "
                "or convert such rows."
            )
