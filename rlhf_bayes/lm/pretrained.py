"""Loads causal LMs from disk or the hub, and refuses models whose checkpoint does not hold all weights."""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed

from rlhf_bayes.lm.adapters import check_can_be_read_again, described

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter instead of a whole model."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def task_of(path: str | Path) -> str | None:
    """The task of the adapter in a folder: "CAUSAL_LM", "SEQ_CLS", …"""
    return PeftConfig.from_pretrained(str(path)).task_type


def tokenizer_folder(path: str | Path) -> str:
    """The folder of the tokenizer of a model or an adapter; an adapter saved without one uses its base's."""
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        return str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
    return str(path)


def load_causal_lm(path: str | Path, is_trainable: bool = False, **init_kwargs: Any) -> Any:
    """
    The causal LM in a folder or a repository of the hub, with all of its weights.

    A folder with a PEFT adapter gives the base that the adapter names, with that adapter, as read by
    `peft.PeftModel.from_pretrained`. `AutoModelForCausalLM` reads such folders too, but initialises weights that it
    does not know again (the magnitudes of DoRA).

    Args:
        path (`str` or `Path`):
            A folder, or a repository of the hub.
        is_trainable (`bool`):
            Whether an adapter is trainable. A whole model always is.
        init_kwargs:
            Arguments of `from_pretrained` for the model or the adapter's base: `dtype`, `revision`, `device_map`, …

    Returns:
        `PreTrainedModel` or `PeftModel`.

    Raises:
        ValueError: if the checkpoint is of an encoder-decoder model or of a classifier, lacks weights or has weights
            that a causal LM has no place for, or is an adapter that cannot be read again.
    """
    if is_adapter(path):
        return _load_adapter(str(path), is_trainable, init_kwargs)
    named = {name: init_kwargs[name] for name in ("revision", "trust_remote_code") if name in init_kwargs}
    config = AutoConfig.from_pretrained(path, **named)
    check_decoder_only(config, str(path))
    # most vision-language models are not among the causal LMs, though they are distributions over completions
    is_vlm = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    model, info = auto_class.from_pretrained(path, output_loading_info=True, **init_kwargs)
    check_whole(path, info)
    return model


def read_renamed_weights(model: Any, folder: str | Path) -> None:
    """
    Read a model's weights from a folder where they have other names than in the model; do nothing where they have not.

    `save_pretrained` stores some families (vision-language models, mixtures of experts) by the names of their first
    release. `load_state_dict`, by which transformers' `Trainer` resumes, finds none of these, and only warns.

    Args:
        model (`PreTrainedModel`):
            The model; nothing is done for others, PEFT-wrapped ones for instance.
        folder (`str` or `Path`):
            A folder that its `save_pretrained` wrote.

    Raises:
        ValueError: if the folder does not hold all weights.
    """
    if not isinstance(model, PreTrainedModel):
        return
    stored: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            stored |= set(weights.keys())
    own = model.state_dict().keys()
    if not (stored - own and own - stored):
        return
    read, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    check_whole(folder, info)
    model.load_state_dict(read.state_dict())
    logger.info("The weights in '%s' have other names than those of the model, and were read by these.", folder)


def load_trunk(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """
    The transformer in a checkpoint, whatever head it has.

    Raises:
        ValueError: if the checkpoint lacks weights of the transformer.
    """
    model, info = AutoModel.from_pretrained(path, output_loading_info=True, dtype=dtype)
    check_whole(path, {**info, "unexpected_keys": []})  # weights of its head are expected to be left over
    return model


def check_whole(path: str | Path, loading_info: Mapping[str, Iterable[Any]]) -> None:
    """
    Refuse a model whose checkpoint does not hold all weights: transformers would draw the missing ones at random.

    Args:
        path (`str` or `Path`):
            The path that the model was loaded from.
        loading_info (`Mapping[str, Iterable]`):
            The loading information of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        ValueError: if keys are missing or unexpected.
    """
    missing, unexpected = (key_names(loading_info[name]) for name in ("missing_keys", "unexpected_keys"))
    if missing:
        raise ValueError(
            f"'{path}' must hold all weights of a causal LM, but its checkpoint lacks {shown(missing)}, which would "
            "be drawn at random. Pass the folder of a causal LM; a model without its head (saved from `AutoModel`) "
            "or a classifier is none."
        )
    if unexpected:
        raise ValueError(
            f"'{path}' must hold a causal LM and nothing else, but its checkpoint has {shown(unexpected)}, which a "
            "causal LM has no place for: the model that was saved computes something else. Load it with its own "
            "class and save the causal LM in it, or pass an instance."
        )


def check_decoder_only(config: PreTrainedConfig, name: str) -> None:
    """
    Refuse encoder-decoder models, whose encoder would read the completion that must be predicted.

    Raises:
        ValueError: if the configuration is that of an encoder-decoder model.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"A causal LM is needed, but '{name}' is an encoder-decoder model ({config.model_type}): there is no "
            "log π(x_t | prompt, x_<t) in one pass over prompt and completion. Pass a decoder-only model."
        )


def key_names(keys: Iterable[Any]) -> list[str]:
    """Sorted names of weights, from the keys that transformers returns: names, or tuples that start with one."""
    return sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)


def shown(keys: list[str]) -> str:
    """The first names of a list, for a message."""
    return f"{', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"


@contextmanager
def whole_weights() -> Iterator[None]:
    """A context that loads models whole, so that they run on each process alone: ZeRO-3 would shard them."""
    config = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _load_adapter(path: str, is_trainable: bool, init_kwargs: dict[str, Any]) -> PeftModel:
    config = PeftConfig.from_pretrained(path)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"A causal LM is needed, but the adapter in '{path}' is for {config.task_type}. Pass an adapter that was "
            "trained with `task_type='CAUSAL_LM'`."
        )
    check_can_be_read_again(config, f"the adapter in '{path}'")
    if not config.base_model_name_or_path:
        raise ValueError(
            f"`base_model_name_or_path` in '{path}/{ADAPTER_CONFIG}' must name the base of the adapter, got "
            f"{config.base_model_name_or_path!r}. Write the base's folder or repository there."
        )
    revision = {} if config.revision is None else {"revision": config.revision}
    base = load_causal_lm(config.base_model_name_or_path, **{**init_kwargs, **revision})
    weights = load_peft_weights(path, device="cpu")
    _resize_as_trained(base, weights)
    with warnings.catch_warnings():
        # PEFT only warns of missing weights; they are refused below
        warnings.filterwarnings("ignore", message=".*missing adapter keys")
        model = PeftModel.from_pretrained(base, path, is_trainable=is_trainable)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing = sorted(expected.keys() - weights.keys())
    # embeddings that were saved whole with the adapter are not part of its own state
    unexpected = sorted(key for key in weights.keys() - expected.keys() if not _is_embedding(key, base))
    if missing or unexpected:
        problem = f"lacks {shown(missing)}" if missing else f"has {shown(unexpected)}, which its kind has no place for"
        raise ValueError(
            f"'{path}' must hold all weights of {described(model)} and no others, but {problem}. Copy the whole "
            "folder that was saved, or read it with the release of PEFT that wrote it."
        )
    return model


def _resize_as_trained(base: Any, weights: dict[str, Tensor]) -> None:
    # an adapter that was trained with a larger vocabulary was saved with its embeddings
    rows = {weight.shape[0] for key, weight in weights.items() if _is_embedding(key, base)}
    if rows and max(rows) != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(max(rows))


def _is_embedding(key: str, base: PreTrainedModel) -> bool:
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if any(module is end for end in ends)]
    return any(f".{name}." in key and key.endswith("weight") for name in names)


def has_whole_weights(model: nn.Module) -> bool:
    """Whether the model can be run here: no weight is sharded by ZeRO-3, or not yet materialised."""
    return not any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters())
