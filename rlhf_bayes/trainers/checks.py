"""Bad input, refused before a model is loaded."""

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def config_of(args: Any, config_class: type[T], model: Any, name: str) -> T:
    """
    A trainer's configuration: as it was given, or with its defaults in a folder named after the model, as TRL has it.

    Args:
        args:
            What the trainer was given as `args`.
        config_class (`type`):
            The trainer's own.
        model (`str` or `PreTrainedModel`):
            The policy.
        name (`str`):
            Of the objective, for the folder.

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


def check_datasets(**datasets: Any) -> None:
    """
    Refuse datasets that no rollout can start from.

    Args:
        **datasets:
            By the name of the trainer's argument: a dataset, a mapping of them, or None.

    Raises:
        ValueError: if one is empty, lacks the column `prompt`, or holds a prompt that is empty or neither text nor
        chat.
    """
    for name, dataset in datasets.items():
        named = dataset.items() if isinstance(dataset, Mapping) else [(None, dataset)]
        for key, part in named:
            if part is not None:
                _check_dataset(name if key is None else f"{name}['{key}']", part)


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


def _check_dataset(name: str, dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"`{name}` must have a column `prompt`, got {list(columns)}. Rename the column that holds prompts: "
            f"`dataset.rename_column({(columns or ['text'])[0]!r}, 'prompt')`."
        )
    if not hasattr(dataset, "__len__"):  # a stream: its rows are checked as they come
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
