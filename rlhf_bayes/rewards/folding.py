"""Folds gain and bias into the weights of the head, so that plain transformers gives the normalised reward."""

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rlhf_bayes.lm.pretrained import is_adapter
from rlhf_bayes.rewards.index import RewardIndex
from rlhf_bayes.rewards.loading import is_head


def write_index(folder: str | Path, index: RewardIndex, before: RewardIndex | None = None) -> RewardIndex:
    """
    Write `reward_model.json` beside saved weights, and change these so that they can be read without it if possible.

    Gain and bias are folded into the head: w ← gain·w, b ← gain·b + bias. A head without a bias, as in decoders, gets
    only the gain, and plain transformers then gives the reward minus a constant. Adapters are not changed, nor heads
    in half precision, which the product would round. Labels in the config describe each number, and its `problem_type`
    says that they are not classes.

    Args:
        folder (`str` or `Path`): Folder of the saved weights.
        index ([`RewardIndex`]): How to read the weights.
        before ([`RewardIndex`], *optional*): The index of the weights, if they contain a scale already.

    Returns:
        [`RewardIndex`]: the index that was written, which says what was folded.
    """
    folder = Path(folder)
    if is_adapter(folder) or not (folder / CONFIG_NAME).is_file():
        index.save(folder)
        return index
    index = replace(index, folded=_fold(folder, index, before))
    _name_labels(folder, index)
    index.save(folder)
    return index


def scale_in_weights(index: RewardIndex | None) -> tuple[Tensor, Tensor] | None:
    """Gain and bias (L,) that the weights contain already, by their index; None if they contain none."""
    if index is None or index.normalization is None or index.folded == "nothing":
        return None
    gain = torch.tensor(index.normalization.gain)
    bias = torch.tensor(index.normalization.bias)
    return gain, bias if index.folded == "gain_and_bias" else torch.zeros_like(bias)


def head_keys(keys: Iterable[str]) -> tuple[str | None, str | None]:
    """Names of the weight and the bias of the layer that gives the labels, among the names of a model's weights."""
    heads = sorted(key for key in keys if is_head(key))
    # in a head of several layers the last one is last in alphabetical order: dense, out_proj
    weight = next((key for key in reversed(heads) if key.endswith(".weight")), None)
    bias = None if weight is None else weight.removesuffix("weight") + "bias"
    return weight, bias if bias in heads else None


def _fold(folder: Path, index: RewardIndex, before: RewardIndex | None) -> str:
    old = scale_in_weights(before)
    if index.normalization is None and old is None:
        return "nothing"
    weight, bias, file = _saved_head(folder)
    if weight is None or file is None:
        return "nothing"
    tensors = load_file(file)
    if old is None and tensors[weight].dtype != torch.float32:
        return "nothing"
    num_labels = tensors[weight].shape[0]
    old_gain, old_bias = old or (torch.ones(num_labels), torch.zeros(num_labels))
    new_gain, new_bias = torch.ones(num_labels), torch.zeros(num_labels)
    if index.normalization is not None:
        new_gain, new_bias = torch.tensor(index.normalization.gain), torch.tensor(index.normalization.bias)
    if len(new_gain) != num_labels:
        return "nothing"
    ratio = new_gain / old_gain  # (L,)
    tensors[weight] = (tensors[weight].float() * ratio[:, None]).to(tensors[weight].dtype)
    if bias is not None:
        tensors[bias] = ((tensors[bias].float() - old_bias) * ratio + new_bias).to(tensors[bias].dtype)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    part = file.with_suffix(".part")
    save_file(tensors, part, metadata)
    os.replace(part, file)  # replaced at once, so that the file is never half-written
    if index.normalization is None:
        return "nothing"
    return "gain" if bias is None else "gain_and_bias"


def _saved_head(folder: Path) -> tuple[str | None, str | None, Path | None]:
    """Names of the head's weight and bias, and the file that holds them."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        files = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"]
    elif (folder / SAFE_WEIGHTS_NAME).is_file():
        with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as opened:
            files = dict.fromkeys(opened.keys(), SAFE_WEIGHTS_NAME)
    else:
        return None, None, None
    weight, bias = head_keys(files)
    if weight is None or files.get(bias, files[weight]) != files[weight]:
        return None, None, None
    return weight, bias, folder / files[weight]


def _name_labels(folder: Path, index: RewardIndex) -> None:
    path = folder / CONFIG_NAME
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names = label_names(index)
    config["id2label"] = {str(label): name for label, name in enumerate(names)}
    config["label2id"] = {name: label for label, name in enumerate(names)}
    config["problem_type"] = "regression"  # pipelines then show the numbers rather than probabilities of classes
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def label_names(index: RewardIndex) -> list[str]:
    """Names of what plain transformers gives: the reward, the reward up to a constant, or the raw logit."""
    if index.normalization is None or index.folded == "gain_and_bias":
        what = "reward"
    else:
        what = "reward_minus_a_constant" if index.folded == "gain" else "reward_not_normalized"
    return [what] if index.kind == "single" else [f"{member}_{what}" for member in index.members]
