"""`rlhf-bayes merge`: merges adapters into their base, for programs that do not read adapters."""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from peft import PeftConfig
from rich.console import Console
from torch import Tensor

from rlhf_bayes.lm.critic import CRITIC, critic_config, is_critic_folder
from rlhf_bayes.lm.merging import merged
from rlhf_bayes.lm.pretrained import is_adapter, load_causal_lm
from rlhf_bayes.lm.probe import disagreement, probe_log_probs, rounding
from rlhf_bayes.rewards.folding import write_index
from rlhf_bayes.rewards.index import RewardIndex
from rlhf_bayes.rewards.loading import (
    DEFAULT_ADAPTER,
    adapter_folders,
    found_index,
    load_adapters,
    load_tokenizer,
)


def run(args: argparse.Namespace) -> None:
    """Write the merged model, for parsed arguments."""
    folder = Path(args.folder)
    output_dir = Path(args.output_dir or f"{folder}-merged")
    notes = merge(folder, output_dir)
    console = Console()
    for note in [*notes, f"Merged into {output_dir}."]:
        console.print(note, highlight=False, markup=False)


def merge(folder: Path, output_dir: Path) -> list[str]:
    """
    Merge the adapters in a folder into their base: W + B·A·α/r for LoRA, in the precision of the base on disk.

    A reward ensemble of K adapters becomes K models in `member_0`, …; its `reward_model.json` is copied. A critic is
    copied too, if it reads the policy's own hidden states or has a trunk of its own.

    Args:
        folder (`Path`):
            The folder in which a trainer saved its model.
        output_dir (`Path`):
            A folder that is new or empty.

    Returns:
        `list[str]`: messages for the user, on what was not copied.

    Raises:
        ValueError: if the folder holds no adapter or one that cannot be merged, `output_dir` is not empty, or
            the merged model computes something else.
    """
    if not is_adapter(folder):
        raise ValueError(
            f"`folder` must hold an adapter (adapter_config.json), got '{folder}'. Pass the output folder of a "
            "training with `use_peft` or `peft_config`; a model without adapters is whole already."
        )
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` must be new or empty, got '{output_dir}'. Name another, or remove it.")
    if PeftConfig.from_pretrained(str(folder)).task_type == "SEQ_CLS":
        _merge_reward(folder, output_dir)
        return []
    model = load_causal_lm(folder, dtype="auto")
    expected = probe_log_probs(model)
    merged(model).save_pretrained(output_dir)
    _check_merged(folder, output_dir, expected)
    load_tokenizer(folder, folder.name).save_pretrained(output_dir)
    return _copy_critic(folder / CRITIC, output_dir / CRITIC)


def _check_merged(folder: Path, output_dir: Path, expected: Tensor) -> None:
    # what was written is what is compared: ties between weights come back when a model is loaded
    written = load_causal_lm(output_dir, dtype="auto")
    error = disagreement(probe_log_probs(written), expected)
    if error > rounding(written):
        shutil.rmtree(output_dir)
        raise ValueError(
            f"The merged model must compute what '{folder}' computes, but its log-probs differ by {error:.3g} nats a "
            "token, and it was removed: its kind of adapter does not add up to weights of the base, or not in the "
            "base's precision. Keep the adapter: `LanguageModel`, the trainers and PEFT read its folder."
        )


def _merge_reward(folder: Path, output_dir: Path) -> None:
    index = found_index(folder)
    tokenizer = load_tokenizer(folder, folder.name)
    if index.kind != "lora":
        _save_merged(load_adapters(folder, [DEFAULT_ADAPTER], num_labels=None, dtype="auto"), tokenizer, output_dir)
        write_index(output_dir, index)
        return
    names = [f"member_{member}" for member in range(index.num_members)]
    for name, place in zip(names, adapter_folders(folder, index.members), strict=True):
        _save_merged(load_adapters(place, [DEFAULT_ADAPTER], dtype="auto"), tokenizer, output_dir / name)
        write_index(output_dir / name, RewardIndex(append_eos=index.append_eos))
    replace(index, kind="models", members=names).save(output_dir)


def _save_merged(model, tokenizer, folder: Path) -> None:
    whole = merged(model)
    # the head reads the last token that is not padding; the base need not know which that is
    padding = tokenizer.pad_token_id
    whole.config.get_text_config().pad_token_id = tokenizer.eos_token_id if padding is None else padding
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _copy_critic(folder: Path, output_dir: Path) -> list[str]:
    if not is_critic_folder(folder):
        return []
    if critic_config(folder)["trunk"] == "adapter":
        return [f"The critic in {folder} is left there: its adapter belongs on the base, without the policy's."]
    shutil.copytree(folder, output_dir)
    return []
