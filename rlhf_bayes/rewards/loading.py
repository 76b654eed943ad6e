"""Classifiers and tokenizers from disk or the hub: nothing in them may be left to chance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, load_peft_weights
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
DEFAULT_ADAPTER = "default"


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter instead of a whole model."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def load_classifier(path: str | Path, num_labels: int | None = None) -> nn.Module:
    """
    A sequence classifier with all of its weights; a folder with a PEFT adapter gives its base under that adapter.

    Args:
        path (`str` or `Path`): A folder, or a repository of the hub.
        num_labels (`int`, *optional*): Labels that it must have. Default: as many as it has.

    Raises:
        `ValueError`: the checkpoint has no classification head, or one of another number of labels.
    """
    if is_adapter(path):
        return load_adapters(path, [DEFAULT_ADAPTER], num_labels)
    model, info = _load(str(path), num_labels)
    # a head that the checkpoint lacks is drawn at random, with a warning only: the reward would be noise
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"`reward_funcs` must name sequence-classification models, got '{path}', whose checkpoint lacks "
            f"{_shown(missing)}: these would be drawn at random. Train a reward model on it first (TRL's "
            "`RewardTrainer`), or pass a model instance if random weights are meant."
        )
    return model


def load_adapters(folder: str | Path, adapters: Sequence[str], num_labels: int | None = 1) -> PeftModel:
    """
    One base and several PEFT adapters, as `PeftModel.save_pretrained` writes them: `"default"` at the root, the others
    in folders of their name. The base is the one that the adapters name; it may be a causal LM, since each adapter
    brings a classification head.

    Raises:
        `ValueError`: an adapter is not there, has no head of its own, or belongs to another base.
    """
    folders = [Path(folder) if name == DEFAULT_ADAPTER else Path(folder) / name for name in adapters]
    bases = []
    for adapter, place in zip(adapters, folders, strict=True):
        if not is_adapter(place):
            raise ValueError(
                f"'{folder}' must hold the adapter '{adapter}' in '{place}', where there is no {ADAPTER_CONFIG}. Copy "
                "the whole folder that was saved."
            )
        bases.append(PeftConfig.from_pretrained(str(place)).base_model_name_or_path)
        heads = [key for key in load_peft_weights(str(place), device="cpu") if _is_head(key)]
        if not heads:
            raise ValueError(
                f"The adapter '{adapter}' in '{folder}' must bring its own classification head, and its weights have "
                "none: the reward would be that of a head that it was not trained with. Train it with "
                '`modules_to_save=["score"]`.'
            )
    named = sorted({str(base) for base in bases})
    if bases[0] is None or len(named) > 1:
        raise ValueError(
            f"The adapters in '{folder}' must name one base model, got {', '.join(named)}. "
            f"Set `base_model_name_or_path` in each {ADAPTER_CONFIG}, or combine whole models instead."
        )
    base, info = _load(bases[0], num_labels)
    missing = [key for key in sorted(info["missing_keys"]) if not _is_head(key)]
    if missing:
        raise ValueError(
            f"'{bases[0]}', the base of the adapters in '{folder}', must hold all weights but the classification "
            f"head, and lacks {_shown(missing)}: these would be drawn at random. Point `base_model_name_or_path` to "
            "the model that the adapters were trained on."
        )
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=adapters[0])
    for adapter, place in zip(adapters[1:], folders[1:], strict=True):
        model.load_adapter(str(place), adapter_name=adapter)
    return model


def load_tokenizer(path: str | Path, name: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer saved beside a model, or beside the base of an adapter.

    Raises:
        `ValueError`: the model was not loaded from a path.
    """
    if not str(path):
        raise ValueError(
            f"`reward_processing_classes` must hold the tokenizer of the reward model '{name}', got None: the model "
            "was not loaded from a path, where one could be found. Pass its tokenizer."
        )
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
    return AutoTokenizer.from_pretrained(str(path))


def _load(path: str, num_labels: int | None) -> tuple[nn.Module, dict[str, Any]]:
    labels = {} if num_labels is None else {"num_labels": num_labels}
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **labels
    )
    mismatched = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info["mismatched_keys"])
    if mismatched:
        saved = AutoConfig.from_pretrained(path).num_labels
        raise ValueError(
            f"'{path}' must have {num_labels} label{'s' if num_labels != 1 else ''} here, but its checkpoint has "
            f"{saved} ({_shown(mismatched)} differ in shape). Take each label as a member with "
            "`RewardEnsemble.from_pretrained`, or one of them as a class with `ClassifierLikelihood`."
        )
    return model, info


def _is_head(key: str) -> bool:
    return any(part in SEQ_CLS_HEAD_NAMES for part in key.split("."))


def _shown(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
