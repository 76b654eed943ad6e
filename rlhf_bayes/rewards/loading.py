"""Loads classifiers and tokenizers from disk or the hub, and refuses weights that would be drawn at random."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, load_peft_weights
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rlhf_bayes.lm.adapters import check_can_be_read_again, check_leaves_base
from rlhf_bayes.lm.pretrained import ADAPTER_CONFIG, is_adapter, key_names, shown, tokenizer_folder
from rlhf_bayes.rewards.index import INDEX_NAME, RewardIndex

DEFAULT_ADAPTER = "default"
_WHOLE_MODEL = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def load_config(path: str | Path, **options: Any) -> PreTrainedConfig:
    """The config of a model, or of the base that an adapter names; `options` go to `AutoConfig.from_pretrained`."""
    if is_adapter(path):
        path = str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
    return AutoConfig.from_pretrained(str(path), **options)


def load_classifier(
    path: str | Path, num_labels: int | None = None, dtype: torch.dtype | str = torch.float32
) -> nn.Module:
    """
    A sequence classifier with all of its weights; a folder with a PEFT adapter gives its base under that adapter.

    Args:
        path (`str` or `Path`): A folder, or a repository of the hub.
        num_labels (`int`, *optional*): Labels that it must have. Default: as many as it has.
        dtype (`torch.dtype` or `"auto"`, *optional*): Type of the weights. `"auto"` takes that of the checkpoint; in
            half precision, different rewards may become equal. Default: fp32, as for a language model.

    Raises:
        `ValueError`: the checkpoint has no classification head, or one of another number of labels.
    """
    if is_adapter(path):
        return load_adapters(path, [DEFAULT_ADAPTER], num_labels, dtype)
    model, info = _load(str(path), num_labels, dtype)
    mismatched = key_names(info["mismatched_keys"])
    if mismatched:
        saved = AutoConfig.from_pretrained(path).num_labels
        raise ValueError(
            f"'{path}' must have {num_labels} label{'s' if num_labels != 1 else ''} here, but its checkpoint has "
            f"{saved}: {shown(mismatched)} has another shape. Take each label as a member with "
            "`RewardEnsemble.from_pretrained`, or one of them as a class with `ClassifierLikelihood`."
        )
    # transformers draws a head that the checkpoint lacks at random, and only warns: the reward would be noise
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"`reward_funcs` must name sequence-classification models, got '{path}', whose checkpoint lacks "
            f"{shown(missing)}: these would be drawn at random. Train a reward model on it first (TRL's "
            "`RewardTrainer`), or pass a model instance if random weights are meant."
        )
    return model


def load_adapters(
    folder: str | Path,
    adapters: Sequence[str],
    num_labels: int | None = 1,
    dtype: torch.dtype | str = torch.float32,
) -> PeftModel:
    """
    One base and several PEFT adapters, as `PeftModel.save_pretrained` writes them.

    `"default"` is at the root, the others are in folders of their name. The base is the one that the adapters name; it
    may be a causal LM, since each adapter brings a classification head.

    Args:
        folder (`str` or `Path`): Where the adapters were saved.
        adapters (`Sequence[str]`): Their names.
        num_labels (`int`, *optional*, defaults to `1`): Labels of each head. `None`: as many as the heads have.
        dtype (`torch.dtype` or `"auto"`, *optional*): Type of the base's weights; see [`load_classifier`].

    Raises:
        `ValueError`: if an adapter is missing, has no head or one with other labels, names another base, or was made
            in a way that changes the base and cannot be repeated here.
    """
    folders = adapter_folders(folder, adapters)
    num_labels = check_adapters(folder, adapters, num_labels)
    configs = [PeftConfig.from_pretrained(str(place)) for place in folders]
    for config in configs:
        check_can_be_read_again(config, f"an adapter in '{folder}'")
        if len(configs) > 1:
            check_leaves_base(config, f"the adapters in '{folder}'")
    base = _load_base(folder, [config.base_model_name_or_path for config in configs], num_labels, dtype)
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=adapters[0])
    for adapter, place in zip(adapters[1:], folders[1:], strict=True):
        model.load_adapter(str(place), adapter_name=adapter)
    return model


def adapter_folders(folder: str | Path, adapters: Sequence[str]) -> list[Path]:
    """The folders in which `PeftModel.save_pretrained` writes each adapter."""
    return [Path(folder) if name == DEFAULT_ADAPTER else Path(folder) / name for name in adapters]


def check_adapters(folder: str | Path, adapters: Sequence[str], num_labels: int | None = 1) -> int:
    """
    Check adapters before they are loaded; returns the number of labels of each head. See [`load_adapters`].

    Raises:
        `ValueError`: if an adapter is missing, or has no head or one with other labels.
    """
    folders = adapter_folders(folder, adapters)
    for adapter, place in zip(adapters, folders, strict=True):
        if not is_adapter(place):
            raise ValueError(
                f"'{folder}' must hold the adapter '{adapter}' in '{place}', where there is no {ADAPTER_CONFIG}. Copy "
                "the whole folder that was saved."
            )
        if any((place / name).is_file() for name in _WHOLE_MODEL):
            raise ValueError(
                f"'{place}' must hold an adapter or a whole model, and holds the weights of both: one of them was "
                f"left there by an earlier run. Remove {ADAPTER_CONFIG} and adapter_model.*, or model.safetensors*."
            )
    labels = [_head_labels(place, adapter) for adapter, place in zip(adapters, folders, strict=True)]
    num_labels = labels[0] if num_labels is None else num_labels
    for adapter, count in zip(adapters, labels, strict=True):
        if count != num_labels:
            raise ValueError(
                f"The adapter '{adapter}' in '{folder}' must have {num_labels} label"
                f"{'s' if num_labels != 1 else ''} here, but its head has {count}. Correct {INDEX_NAME} there, or "
                "save the model again."
            )
    return num_labels


def head_labels(folder: str | Path) -> int:
    """
    Number of labels of the classification head in a folder: of its PEFT adapter, or of its model.

    Raises:
        `ValueError`: if an adapter has no head.
    """
    if is_adapter(folder):
        return _head_labels(Path(folder), DEFAULT_ADAPTER)
    return AutoConfig.from_pretrained(folder).num_labels or 1


def _head_labels(folder: Path, adapter: str) -> int:
    weights = load_peft_weights(str(folder), device="cpu")
    heads = [key for key in weights if is_head(key)]
    if not heads:
        raise ValueError(
            f"The adapter '{adapter}' in '{folder}' must bring its own classification head, and its weights have "
            "none: the reward would be that of a head that it was not trained with. Train it with "
            '`modules_to_save=["score"]`.'
        )
    # in a head of several layers the last one is last in alphabetical order: dense, out_proj
    return weights[max(key for key in heads if key.endswith("weight"))].shape[0]


def _load_base(
    folder: str | Path, paths: Sequence[str | None], num_labels: int, dtype: torch.dtype | str
) -> nn.Module:
    named = sorted({str(path) for path in paths})
    if not paths[0] or len(named) > 1:
        raise ValueError(
            f"The adapters in '{folder}' must name one base model, got {', '.join(named)}. Set "
            f"`base_model_name_or_path` in each {ADAPTER_CONFIG}, or combine whole models instead."
        )
    with _no_load_report():  # transformers would report a head drawn at random, but each adapter replaces it
        base, info = _load(paths[0], num_labels, dtype)
    missing = [key for key in key_names([*info["missing_keys"], *info["mismatched_keys"]]) if not is_head(key)]
    if missing:
        raise ValueError(
            f"'{paths[0]}', the base of the adapters in '{folder}', must hold all weights but the classification "
            f"head, and lacks {shown(missing)}: these would be drawn at random. Point `base_model_name_or_path` to "
            "the model that the adapters were trained on."
        )
    return base


def local_folder(path: str | Path) -> Path:
    """The path of a folder; a repository of the hub is downloaded first."""
    return Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path)))


def found_index(folder: Path) -> RewardIndex:
    """
    The index of a folder, or one made from its files if there is none.

    Raises:
        `ValueError`: if the folder holds members that the index does not name.
    """
    index = RewardIndex.load(folder)
    if index is None:
        return _guessed_index(folder)
    unknown = sorted(set(_subfolders(folder)) - set(index.members)) if index.kind in ("lora", "models") else []
    if unknown:
        raise ValueError(
            f"{INDEX_NAME} in '{folder}' must name all members, and does not know {', '.join(unknown)}. Correct the "
            "file, or remove what was left there by an earlier run."
        )
    return index


def _subfolders(folder: Path) -> list[str]:
    numbers = [place.name.removeprefix("member_") for place in folder.glob("member_*") if place.is_dir()]
    return [f"member_{number}" for number in sorted(filter(str.isdecimal, numbers), key=int)]


def _guessed_index(folder: Path) -> RewardIndex:
    names = _subfolders(folder)
    if is_adapter(folder):
        adapters = [name for name in names if is_adapter(folder / name)]
        if adapters:
            return RewardIndex("lora", [DEFAULT_ADAPTER, *adapters])
    elif not (folder / "config.json").is_file():
        if names:
            return RewardIndex("models", names)
        raise ValueError(
            f"'{folder}' must hold a model (config.json), an adapter ({ADAPTER_CONFIG}) or members (member_0, …), and "
            "has none of them. Pass the folder that the model was saved in."
        )
    labels = head_labels(folder)
    return RewardIndex("heads", [f"head_{label}" for label in range(labels)]) if labels > 1 else RewardIndex()


def load_tokenizer(path: str | Path, name: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer saved beside a model, or beside the base of an adapter.

    Raises:
        `ValueError`: if the model was not loaded from a path.
    """
    if not str(path):
        raise ValueError(
            f"`reward_processing_classes` must hold the tokenizer of the reward model '{name}', got None: the model "
            "was not loaded from a path, where one could be found. Pass its tokenizer."
        )
    return AutoTokenizer.from_pretrained(tokenizer_folder(path))


def _load(path: str, num_labels: int | None, dtype: torch.dtype | str) -> tuple[nn.Module, dict[str, Any]]:
    labels = {} if num_labels is None else {"num_labels": num_labels}
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **labels
    )
    return model, info


@contextmanager
def _no_load_report() -> Iterator[None]:
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_head(key: str) -> bool:
    """Whether a weight, or a module, is that of a classification head, by its name."""
    return any(part in SEQ_CLS_HEAD_NAMES for part in key.split("."))
