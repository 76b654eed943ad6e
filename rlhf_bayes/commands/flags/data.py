"""Loads prompts and preferences by name, from files, folders or the hub."""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset, load_from_disk

from rlhf_bayes.rewards.lengths import LengthLimit, num_positions
from rlhf_bayes.rewards.loading import load_config, load_tokenizer
from rlhf_bayes.rewards.pairs import guessed_prompt, read_pairs

logger = logging.getLogger(__name__)

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
    A dataset with its prompts in the column `prompt`. It keeps its other columns, for the reward functions.

    Args:
        dataset_name (`str`):
            A .json, .jsonl, .parquet, .csv or .txt file (.gz too), a folder of `save_to_disk`, or a name on the hub.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            The column that holds the prompts, texts or chats. It is renamed; another column `prompt` is dropped.
        max_prompts (`int`, *optional*):
            Keep this many prompts, chosen at random. Default: all.
        split, config (`str`, *optional*):
            As in [`~datasets.load_dataset`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of that choice.

    Raises:
        FileNotFoundError: if a local path does not exist.
        ValueError: if the column or the split does not, `max_prompts` is not positive, or there are no prompts.
        TypeError: if one is neither a text nor a chat.
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
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str | list):
            raise TypeError(
                f"`prompt_column` must hold texts or chats, got {prompt!r} in row {row} of {prompt_column!r}. Name "
                "another column, or drop the row."
            )
    return dataset


def load_preferences(
    dataset_name: str,
    split: str = "train",
    config: str | None = None,
    columns: Sequence[str] = (),
    drop_columns: Sequence[str] = (),
    max_pairs: int | None = None,
    seed: int = 0,
) -> Dataset:
    """
    Pairs with the column names of [`~rlhf_bayes.RewardTrainer`]: `chosen`, `rejected`, `prompt`, `votes`, …

    Args:
        dataset_name (`str`):
            As in [`load_prompts`].
        split, config (`str`, *optional*):
            As in [`~datasets.load_dataset`].
        columns (`Sequence[str]`, *optional*):
            Entries `name=column`: the column `column` is renamed to `name`, the trainer's name for it. Another column
            `name` is dropped. `votes=a,b` or `votes=a,b,c` joins columns of counts.
        drop_columns (`Sequence[str]`, *optional*):
            Columns to leave out: the votes, for instance, to learn from the label alone.
        max_pairs (`int`, *optional*):
            Keep this many pairs, chosen at random. Default: all.
        seed (`int`, *optional*, defaults to `0`):
            Seed of that choice.

    Raises:
        FileNotFoundError: if a local path does not exist.
        ValueError: if a column or the split does not, `columns` has another form, or `max_pairs` is not positive.
    """
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(f"`max_pairs` must be at least 1, got {max_pairs}. Leave it out to keep all pairs.")
    dataset = _load(dataset_name, config, split)
    renamed = dict(_renaming(entry) for entry in columns)
    counts = renamed["votes"].split(",") if "," in renamed.get("votes", "") else []
    if counts:
        del renamed["votes"]
    for flag, names in (("columns", [*renamed.values(), *counts]), ("drop_columns", drop_columns)):
        missing = [name for name in names if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"`{flag}` must name columns of `dataset_name`, {dataset.column_names}, got {missing[0]!r}. Correct "
                "the name."
            )
    if len(set(renamed.values())) < len(renamed):
        raise ValueError(f"`columns` must name each column once, got {list(columns)}. Copy it in the data instead.")
    dataset = dataset.remove_columns(list(drop_columns))
    if counts:
        dataset = dataset.map(functools.partial(_joined_votes, columns=counts), remove_columns=counts)
    # renamed all at once, since the new name of one column may be the old name of another
    replaced = [name for name in renamed if name in dataset.column_names and name not in renamed.values()]
    dataset = dataset.remove_columns(replaced).rename_columns({column: name for name, column in renamed.items()})
    lacking = [name for name in ("chosen", "rejected") if name not in dataset.column_names]
    if lacking:
        raise ValueError(
            f"`dataset_name` must have the columns `chosen` and `rejected`, got {dataset.column_names}. Say which one "
            f"holds the {'preferred' if lacking[0] == 'chosen' else 'other'} text: `--columns {lacking[0]}=<column>`."
        )
    dataset = read_pairs(f"{dataset_name} ({split})", dataset)
    if max_pairs is not None and max_pairs < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(max_pairs))
    return dataset


def prompts_of_pairs(
    pairs: Dataset, max_prompts: int, path: str, max_completion_length: int, tokenizer: Any = None
) -> list:
    """
    The first distinct prompts of preference data that a language model can complete.

    Where there is no column `prompt`, they are what the texts of a pair begin with, up to a turn or a word. Prompts
    that are too long for the language model are left out, and counted in a warning.

    Args:
        pairs (`Dataset`): from [`load_preferences`].
        max_prompts (`int`): largest number of prompts.
        path (`str`): the language model's; only its config and tokenizer are read.
        max_completion_length (`int`): tokens that must fit after a prompt.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the language model. Default: the one in `path`.

    Raises:
        ValueError: if no pair has one, none fits, or chats come without a chat template.
    """
    prompts = [guessed_prompt(row) for row in pairs]  # pyright: ignore[reportArgumentType]
    prompts = list({str(prompt): prompt for prompt in prompts if prompt}.values())
    if not prompts:
        raise ValueError(
            "`dataset_name` must hold prompts to draw completions for, and the texts of no pair have a beginning in "
            "common. Name their column, `--columns prompt=<column>`; or draw none, `--normalize_on chosen`."
        )
    tokenizer = load_tokenizer(path, path) if tokenizer is None else tokenizer
    positions = num_positions(load_config(path))
    if not isinstance(prompts[0], str) and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"The tokenizer of '{path}' must have a `chat_template` to complete prompts that are chats, got none. "
            "Set `--chat_template_path`, name another model with `--prior_name_or_path`, or draw no completions, "
            "`--normalize_on chosen`."
        )
    limit = LengthLimit(positions=positions)
    fitting, too_long = [], 0
    for prompt in prompts:
        length = _num_tokens(tokenizer, prompt)
        fits = length > 0 and limit.allows(length + max_completion_length)
        too_long += not fits
        fitting += [prompt] if fits else []
        if len(fitting) == max_prompts:
            break
    found = (
        f"{too_long} of {too_long + len(fitting)} prompts and a completion of {max_completion_length} tokens have "
        f"more tokens than '{path}' has positions for, {positions}"
    )
    if not fitting:
        raise ValueError(
            f"{found}. None is left to draw completions for. Lower `--max_completion_length`, name another model with "
            "`--prior_name_or_path`, or draw none, `--normalize_on chosen`."
        )
    if too_long:
        logger.warning(f"{found}: no completions are drawn for them.")
    return fitting


def _num_tokens(tokenizer: Any, prompt: Any) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])


def hold_out(dataset: Dataset, share: float, by: str | None = None, seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    Split a dataset into rows to train on and rows to evaluate on.

    Args:
        dataset (`Dataset`):
            All rows.
        share (`float`):
            The share of rows, or of groups, that is held out; at least one is, and not all are.
        by (`str`, *optional*):
            A column whose values are groups that are not split: pairs of one topic, say, are not independent.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice.

    Raises:
        ValueError: if `share` is outside of (0, 1), there is no column `by`, or there are fewer than two groups.
    """
    if not 0 < share < 1:
        raise ValueError(f"`held_out` must be between 0 and 1, got {share}. For a tenth of the pairs, use 0.1.")
    if by is not None and by not in dataset.column_names:
        raise ValueError(
            f"`held_out_by` must be one of the columns, {dataset.column_names}, got {by!r}. Leave it out to hold out "
            "single pairs."
        )
    groups = range(len(dataset)) if by is None else [str(value) for value in dataset[by]]
    distinct = sorted(set(groups))
    if len(distinct) < 2:
        raise ValueError(
            f"`dataset_name` must have at least 2 {'rows' if by is None else f'groups in {by!r}'} to hold some out, "
            f"got {len(distinct)}. Name a split to judge on, or another column."
        )
    count = min(max(round(share * len(distinct)), 1), len(distinct) - 1)
    kept_out = {distinct[index] for index in np.random.default_rng(seed).permutation(len(distinct))[:count]}
    train = dataset.select([row for row, group in enumerate(groups) if group not in kept_out])
    return train, dataset.select([row for row, group in enumerate(groups) if group in kept_out])


def _joined_votes(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {"votes": [row[column] for column in columns]}


def _renaming(entry: str) -> tuple[str, str]:
    name, equals, column = entry.partition("=")
    if not (name and equals and column):
        raise ValueError(
            f"`columns` must have entries of the form `name=column`, got {entry!r}. For preferred texts in a column "
            "`better`: `--columns chosen=better`."
        )
    return name, column


def _load(name: str, config: str | None, split: str) -> Dataset:
    path = Path(name)
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if (path / "dataset_dict.json").is_file():
        if not (path / split).is_dir():
            splits = sorted(child.name for child in path.iterdir() if child.is_dir())
            raise ValueError(f"The split must be one of {splits}, those in {name!r}, got {split!r}. Name one of them.")
        return load_from_disk(path / split)
    if (path / "state.json").is_file():
        return load_from_disk(path)
    if path.is_file():
        if suffix not in _BUILDERS:
            raise ValueError(
                f"`dataset_name` must end in one of {sorted(_BUILDERS)} (and .gz) where it is a file, got {name!r}. "
                "Convert it, or use `Dataset.save_to_disk`."
            )
        if path.stat().st_size == 0:  # `datasets` fails on it with an unclear error
            raise ValueError(f"`dataset_name` must hold at least one row, got the empty file {name!r}. Name another.")
        # `datasets` calls the only split of a file "train"
        return load_dataset(_BUILDERS[suffix], data_files=str(path), split="train")
    if not path.is_dir() and (suffix in _BUILDERS or path.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(
            f"`dataset_name` must be a file or folder that exists, or a name on the hub, got {name!r}, which is "
            f"not there when read from {os.getcwd()}. Correct the path."
        )
    return load_dataset(name, config, split=split)
