"""`rlhf-bayes export`: one model that gives a reward model's score in plain transformers."""

import argparse
import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from rlhf_bayes.lm.merging import merged
from rlhf_bayes.rewards import Normalization, RewardEnsemble, RewardIndex, RewardModel, load_reward
from rlhf_bayes.rewards.folding import scale_in_weights, write_index
from rlhf_bayes.rewards.loading import DEFAULT_ADAPTER, adapter_folders, is_head, load_adapters

TOLERANCE = 1e-3  # of the exported score, in units of reward, and relative to it


def run(args: argparse.Namespace) -> None:
    """Write the model, for parsed arguments."""
    folder = Path(args.folder)
    output_dir = Path(args.output_dir or f"{folder}-exported")
    notes = export(folder, output_dir, args.member)
    console = Console()
    for note in [*notes, f"Exported to {output_dir}."]:
        console.print(note, highlight=False, markup=False)


def export(folder: Path, output_dir: Path, member: str | None = None) -> list[str]:
    """
    Write one sequence classifier with one label whose logit is the reward.

    It is read back by plain transformers and compared with the reward on some texts before it counts as written.

    Args:
        folder (`Path`): Where a reward model or an ensemble was saved.
        output_dir (`Path`): New or empty.
        member (`str`, *optional*): The member of an ensemble. Default: their mean, for heads on one trunk.

    Returns:
        `list[str]`: how the exported score differs, for the user to know.

    Raises:
        ValueError: if there is no reward model, an ensemble whose mean is no single model, no member of this name,
            something else in `output_dir`, or a score that differs.
    """
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder of a reward model, got '{folder}', which is not there.")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` must be new or empty, got '{output_dir}'. Name another, or remove it.")
    reward = load_reward(folder)
    tokenizer = copy.deepcopy(reward.classifiers[0].tokenizer)
    texts = _some_texts(tokenizer)
    _check_member(reward, member)
    expected = _scores(reward, member, texts)  # now: the model is changed below
    model, index = _single(folder, reward, member)
    notes = []
    if index.append_eos and not index.tokenizer_appends_eos:
        index.tokenizer_appends_eos = _append_eos(tokenizer, texts[0])
        if not index.tokenizer_appends_eos:
            notes.append(f"The tokenizer cannot append EOS: append {tokenizer.eos_token!r} to each text yourself.")
    # the head reads the last token that is not padding; the base of an adapter may not know which that is
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    index = write_index(output_dir, index)
    constant = 0.0
    if index.normalization is not None and index.folded == "gain":
        constant = index.normalization.bias[0]
        notes.append(
            f"The head has no bias, so the logit is the reward minus {constant:.6g}: the same for all texts, which "
            "changes no comparison and no posterior."
        )
    try:
        _check_score(output_dir, texts, expected, constant, index)
    except ValueError:
        shutil.rmtree(output_dir)
        raise
    return notes


def _check_member(reward: RewardModel | RewardEnsemble, member: str | None) -> None:
    if isinstance(reward, RewardModel):
        if member is not None:
            raise ValueError(f"`member` must be left out for a single reward model, got {member!r}. Leave it out.")
        return
    members = reward.index.members
    if member is not None and member not in members:
        raise ValueError(f"`member` must be one of {', '.join(members)}, got {member!r}. Name one of them.")
    if member is None and reward.index.kind != "heads":
        raise ValueError(
            f"`member` must be given for an ensemble of {reward.num_members} {reward.index.kind}, whose mean is no "
            f"single model. Name one of {', '.join(members)}."
        )


def _single(folder: Path, reward: RewardModel | RewardEnsemble, member: str | None) -> tuple[Any, RewardIndex]:
    """A classifier with one label and raw logits, and the index that says how its logit becomes the reward."""
    if isinstance(reward, RewardModel):
        return _whole(reward.model, reward.classifier.index), reward.index
    members = reward.index.members
    if reward.index.kind == "heads" or member is None:
        return _mean_of_heads(reward, members if member is None else [member])
    place = members.index(member)
    normalization = reward.normalization and reward.normalization.member(place)
    if reward.index.kind == "lora":
        model = load_adapters(adapter_folders(folder, [member])[0], [DEFAULT_ADAPTER])
        return _whole(model, None), RewardIndex(append_eos=reward.index.append_eos, normalization=normalization)
    classifier = reward.classifiers[place]
    inner = classifier.index and classifier.index.normalization
    index = RewardIndex(append_eos=classifier.append_eos, normalization=_composed(inner, normalization))
    return _whole(classifier.model, classifier.index), index


def _whole(model: nn.Module, index: RewardIndex | None) -> nn.Module:
    """The model without adapters, whose head gives raw logits."""
    if isinstance(model, PeftModel):
        model = merged(model)
    scale = scale_in_weights(index)
    if scale is not None:
        _set_head(model, *_raw(_head(model)[2], scale))
    return model


def _mean_of_heads(reward: RewardEnsemble, members: list[str]) -> tuple[nn.Module, RewardIndex]:
    classifier, index = reward.classifiers[0], reward.index
    rows = [index.members.index(member) for member in members]
    model = classifier.model
    if isinstance(model, PeftModel):
        model = merged(model)
    weight, bias = _raw(_head(model)[2], scale_in_weights(classifier.index))  # (K, H), (K,) or None
    gain, constant = torch.ones(len(rows)), torch.zeros(len(rows))
    reference = ""
    if index.normalization is not None:
        gain, constant = torch.tensor(index.normalization.gain)[rows], torch.tensor(index.normalization.bias)[rows]
        reference = index.normalization.reference
    _set_head(
        model,
        (gain[:, None] * weight[rows]).mean(0, keepdim=True),
        None if bias is None else (gain * bias[rows]).mean(0, keepdim=True),
    )
    normalization = None
    if index.normalization is not None:
        normalization = Normalization((1.0,), (constant.mean().item(),), reference)
    return model, RewardIndex(append_eos=index.append_eos, normalization=normalization)


def _head(model: nn.Module) -> tuple[nn.Module, str, nn.Linear]:
    """The layer that gives the labels: the module that holds it, its name there, and itself."""
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and is_head(name)]
    if not linear:
        raise ValueError(f"The reward model must have a linear head to be exported, got {type(model).__name__}.")
    owner, _, name = max(linear).rpartition(".")
    holder = model.get_submodule(owner)
    head: Any = getattr(holder, name)
    return holder, name, head


def _raw(head: nn.Linear, scale: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """Weight (K, H) and bias (K,) of the head without the scale that its weights hold."""
    weight, bias = head.weight.detach().float(), None if head.bias is None else head.bias.detach().float()
    if scale is None:
        return weight, bias
    gain, constant = scale
    return weight / gain[:, None], None if bias is None else (bias - constant) / gain


def _set_head(model: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    holder, name, head = _head(model)
    new = nn.Linear(head.in_features, len(weight), bias=bias is not None).to(head.weight)
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    setattr(holder, name, new)
    config: Any = model.config
    config.num_labels = len(weight)
    if hasattr(model, "num_labels"):
        model.num_labels = len(weight)  # pyright: ignore[reportArgumentType]


def _composed(inner: Normalization | None, outer: Normalization | None) -> Normalization | None:
    """Gain and bias of the outer scale after the inner one."""
    if inner is None or outer is None:
        return inner or outer
    gain, bias = outer.gain[0] * inner.gain[0], outer.gain[0] * inner.bias[0] + outer.bias[0]
    return Normalization((gain,), (bias,), outer.reference)


def _append_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Let the tokenizer append EOS to each text, among its own special tokens as seen on a text; whether it can."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    bare, full = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next((place for place in range(len(full)) if full[place : place + len(bare)] == bare), None)
    if start is None:
        return False
    # one template for all special tokens: of two processors in a row, the second takes what the first added for a text
    ids = [*full[:start], tokenizer.eos_token_id, *full[start + len(bare) :]]
    names = [f"TOKEN{place}" for place in range(len(ids))]  # of their own, since "$" would be a part of a template
    tokens: Any = [
        {"id": name, "ids": [token], "tokens": [tokenizer.convert_ids_to_tokens(token)]}
        for name, token in zip(names, ids, strict=True)
    ]
    single = " ".join([*names[:start], "$A", *names[start:]])
    backend.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    return True


def _some_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A few texts of random tokens, which any tokenizer can read."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(len(tokenizer), (length,), generator=generator) for length in (1, 2, 3, 5, 8, 12)]
    return [text for text in (tokenizer.decode(row, skip_special_tokens=True) for row in ids) if text]


def _scores(reward: RewardModel | RewardEnsemble, member: str | None, texts: list[str]) -> Tensor:
    """What is to be exported, of each text (N,)."""
    rewards = reward.member_rewards([""] * len(texts), texts)  # (K, N)
    return rewards.mean(0) if member is None else rewards[reward.index.members.index(member)]


@torch.no_grad()
def _check_score(folder: Path, texts: list[str], expected: Tensor, constant: float, index: RewardIndex) -> None:
    """
    Compare what plain transformers gives with the reward.

    Raises:
        ValueError: they differ.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    eos = "" if not index.append_eos or index.tokenizer_appends_eos else tokenizer.eos_token
    rows = [tokenizer(text + eos, return_tensors="pt", add_special_tokens=index.append_eos) for text in texts]
    found = torch.stack([model(row["input_ids"]).logits[0, 0] for row in rows]) + constant  # (N,)
    if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
        row = int((found - expected).abs().argmax())
        raise ValueError(
            f"The exported model must give the reward in plain transformers, got {found[row].item():.6g} in place of "
            f"{expected[row].item():.6g} for {texts[row]!r}. Nothing was written. Use the folder with `load_reward`."
        )
