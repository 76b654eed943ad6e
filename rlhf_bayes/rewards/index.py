"""The file beside a reward model's weights that says how to read them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from transformers.utils.hub import cached_file

from rlhf_bayes.rewards.normalization import Normalization

INDEX_NAME = "reward_model.json"
FOLDED = ("nothing", "gain", "gain_and_bias")
KINDS = ("single", "heads", "lora", "models")


@final
@dataclass
class RewardIndex:
    """
    How a reward model's weights are to be read; stored as `reward_model.json` beside them.

    Args:
        kind (`str`):
            `"single"`: one classifier of one label. `"heads"`: one classifier, a label for each member. `"lora"`: one
            base and a PEFT adapter for each member. `"models"`: a folder for each member.
        members (`list[str]`):
            K names: adapters (`"default"` is the one at the root), subfolders, or names of heads. May be left out for
            a single model.
        append_eos (`bool`):
            Whether plain texts, but not chats, are read as TRL's `RewardTrainer` tokenises them in training: an EOS is
            appended if there is none, and the tokenizer's special tokens are added. If not, they are read as TRL's
            trainers score texts, without either.
        normalization ([`Normalization`], *optional*):
            Gain and bias of each member.
        folded (`str`, *optional*, defaults to `"nothing"`):
            What of gain and bias is in the weights of the head already: `"nothing"`, `"gain"`, or `"gain_and_bias"`.
        tokenizer_appends_eos (`bool`, *optional*, defaults to `False`):
            Whether the saved tokenizer appends the EOS of `append_eos` itself, for those who read the model without
            this package.

    Raises:
        `ValueError`: if the kind is unknown, or numbers of members contradict each other.
    """

    kind: str = "single"
    members: list[str] = field(default_factory=list)
    append_eos: bool = False
    normalization: Normalization | None = None
    folded: str = "nothing"
    tokenizer_appends_eos: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"`kind` in {INDEX_NAME} must be one of {', '.join(KINDS)}, got {self.kind!r}. The file may come from "
                "a newer version of rlhf_bayes."
            )
        if self.folded not in FOLDED:
            raise ValueError(f"`folded` in {INDEX_NAME} must be one of {', '.join(FOLDED)}, got {self.folded!r}.")
        if self.kind == "single" and not self.members:
            self.members = ["model"]
        if not self.members or len(set(self.members)) != len(self.members):
            raise ValueError(
                f"`members` in {INDEX_NAME} must name each member once, got {self.members}. Name the heads, adapters "
                "or subfolders."
            )
        if self.kind == "single" and len(self.members) > 1:
            raise ValueError(
                f"`kind` in {INDEX_NAME} must be heads, lora or models when there are {len(self.members)} members, "
                "got 'single'. Correct the file."
            )
        if self.normalization is not None and len(self.normalization.gain) != self.num_members:
            raise ValueError(
                f"`normalization` in {INDEX_NAME} must have a gain for each of the {self.num_members} members, got "
                f"{len(self.normalization.gain)}. Normalise the model again."
            )

    @property
    def num_members(self) -> int:
        """The number of members, K."""
        return len(self.members)

    def save(self, folder: str | Path) -> None:
        """Write `reward_model.json` into a folder, which is made if there is none."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        fields = {
            "kind": self.kind,
            "members": self.members,
            "append_eos": self.append_eos,
            "normalization": None if self.normalization is None else self.normalization.to_dict(),
        }
        # entries with their default are left out, so that versions without them can read the file
        if self.folded != "nothing":
            fields["folded"] = self.folded
        if self.tokenizer_appends_eos:
            fields["tokenizer_appends_eos"] = True
        (Path(folder) / INDEX_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "RewardIndex | None":
        """
        The index in a folder or a repository of the hub, or None where there is none.

        Raises:
            `ValueError`: if the file is not an index.
        """
        path = _find(folder)
        if path is None:
            return None
        try:
            fields: Any = json.loads(path.read_text(encoding="utf-8"))
            normalization = fields.pop("normalization", None)
            if normalization is not None:
                normalization = Normalization(**normalization)
            return cls(**fields, normalization=normalization)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"`{path}` must hold kind, members, append_eos and normalization, or other fields of `RewardIndex`: "
                f"{error} Write it again with `RewardIndex.save`, or remove it to read the weights as they are."
            ) from error


def _find(folder: str | Path) -> Path | None:
    if Path(folder).is_dir():
        path = Path(folder) / INDEX_NAME
        return path if path.is_file() else None
    found = cached_file(
        str(folder),
        INDEX_NAME,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
