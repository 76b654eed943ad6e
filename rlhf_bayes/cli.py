"""What a script's flags name: prompts and reward functions. Wrong names are refused before a model is loaded."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk

_BUILDERS = {"json": "json", "jsonl": "json", "parquet": "parquet", "csv": "csv", "txt": "text"}


def load_prompts(
    dataset_name: str,
    prompt_column: str = "prompt",
    max_prompts: int | None = None,
    split: str = "train",
    config: str | None = None,
    seed: int = 0,
) -> Dataset:
    """
    A dataset with its prompts in the column `prompt`; its other columns are left for the reward functions.

    Args:
        dataset_name (`str`):
            A .json, .jsonl, .parquet, .csv or .txt file (.gz too), a folder of `save_to_disk`, or a name on the hub.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Where the prompts are: texts or chats. It is renamed; another column `prompt` is dropped.
        max_prompts (`int`, *optional*):
            Keep that many, chosen at random.
        split, config (`str`, *optional*):
            As in [`~datasets.load_dataset`].
        seed (`int`, *optional*, defaults to `0`):
            Of that choice.

    Raises:
        FileNotFoundError: if a local path does not exist.
        ValueError: if the column or the split does not, or `max_prompts` is not positive.
    """
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"`max_prompts` must be at least 1, got {max_prompts}. Leave it out to keep all prompts.")
    dataset = _load(dataset_name, config, split)
    if prompt_column not in dataset.column_names:
        raise ValueError(
            f"`prompt_column` must be one of the columns of `dataset_name`, {dataset.column_names}, got "
            f"{prompt_column!r}. Name the one that holds the prompts: `--prompt_column {dataset.column_names[0]}`."
        )
    if prompt_column != "prompt":
        if "prompt" in dataset.column_names:
            dataset = dataset.remove_columns("prompt")
        dataset = dataset.rename_column(prompt_column, "prompt")
    if max_prompts is not None and max_prompts < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(max_prompts))
    return dataset


def _load(name: str, config: str | None, split: str) -> Dataset:
    path = Path(name)
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if (path / "dataset_dict.json").is_file():
        if not (path / split).is_dir():
            splits = sorted(child.name for child in path.iterdir() if child.is_dir())
            raise ValueError(f"`dataset_train_split` must be one of {splits}, the splits in {name!r}, got {split!r}.")
        return load_from_disk(path / split)
    if (path / "state.json").is_file():
        return load_from_disk(path)
    if path.is_file():
        if suffix not in _BUILDERS:
            raise ValueError(
                f"`dataset_name` must end in one of {sorted(_BUILDERS)} (and .gz) where it is a file, got {name!r}. "
                "Convert it, or use `Dataset.save_to_disk`."
            )
        # a file is one split, which `datasets` calls train
        return load_dataset(_BUILDERS[suffix], data_files=str(path), split="train")
    if not path.is_dir() and (suffix in _BUILDERS or path.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(
            f"`dataset_name` must be a file or folder that exists, or a name on the hub, got {name!r}, which is "
            f"not there when read from {os.getcwd()}. Correct the path."
        )
    return load_dataset(name, config, split=split)


def load_reward_func(name: str) -> Callable[..., Any]:
    """
    The reward function that `module:function` names. Modules in the current folder are found too.

    Raises:
        ValueError: if the name has another form, the module cannot be imported, or has no such function.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(
            f"`reward_func` must have the form `module:function`, got {name!r}. For a module `rewards.py` in the "
            "current folder: `--reward_func rewards:my_reward`."
        )
    if os.getcwd() not in sys.path:  # `accelerate launch` puts the script's folder there, not the current one
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"`reward_func` must name a module that can be imported, got {name!r}: {error}. Modules are looked for "
            f"among the installed packages and in {os.getcwd()}."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [
            public for public in vars(module) if not public.startswith("_") and callable(vars(module)[public])
        ]
        close = difflib.get_close_matches(function_name, functions, n=1)
        raise ValueError(
            f"`reward_func` must name a function of {module_name!r}, got {function_name!r}. "
            + (f"Is {close[0]!r} meant?" if close else f"It has {functions}.")
        )
    return function
