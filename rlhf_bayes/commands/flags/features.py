"""Parses flags that give features of completions and the means that these are asked to have."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_bayes.commands.flags.named import load_function


def parse_features(
    features: Sequence[str] = (), words: Sequence[str] = ()
) -> dict[str, tuple[Callable[..., Any], float]]:
    """
    Features and their means, name -> (function, moment), as `LanguageModel.constrain` takes them.

    Args:
        features (`Sequence[str]`):
            Entries `module:function=moment`. The functions have the protocol of TRL's reward functions, and give the
            features their names.
        words (`Sequence[str]`):
            Entries `word,word,…=moment`, or `name:word,word,…=moment`. The feature is whether a completion contains
            one of these words: see [`contains_words`].

    Raises:
        ValueError: if an entry has another form, a moment is not a number (for words: not a share), or two features
            have the same name.
    """
    constraints: dict[str, tuple[Callable[..., Any], float]] = {}
    for flag, entries in (("features", features), ("words", words)):
        for entry in entries:
            left, moment = _moment(entry, flag)
            if flag == "features":
                name, function = left.rpartition(":")[2], load_function(left, flag)
            else:
                name, function = _word_feature(left, entry, moment)
            if name in constraints:
                raise ValueError(
                    f"`{flag}` must have names that differ, got {name!r} twice. "
                    + ("Write `name:word,word=moment`." if flag == "words" else "Give the function another name.")
                )
            constraints[name] = (function, moment)
    return constraints


def contains_words(words: Sequence[str]) -> Callable[..., list[float]]:
    """
    The feature that is 1 for completions that contain one of these words or phrases, and 0 for others.

    Whole words count, in any case: "cat" is in "The Cat sat.", but not in "scattered" or "cats".
    """
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)

    def mentions(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(pattern.search(_text(completion)) is not None) for completion in completions]

    return mentions


def _text(completion: Any) -> str:
    """The text of a completion; of a chat, the text of all its messages."""
    return completion if isinstance(completion, str) else "\n".join(message["content"] for message in completion)


def _moment(entry: str, flag: str) -> tuple[str, float]:
    left, _, right = entry.rpartition("=")
    try:
        moment = float(right)
    except ValueError:
        moment = float("nan")
    if not left or moment != moment:
        form, example = ("module:function", "my_module:my_feature") if flag == "features" else ("word,word", "cat,dog")
        raise ValueError(
            f"`{flag}` must have the form `{form}=moment`, got {entry!r}. For a mean of one half: "
            f"`--{flag} {example}=0.5`."
        )
    return left, moment


def _word_feature(left: str, entry: str, moment: float) -> tuple[str, Callable[..., Any]]:
    name, _, listed = left.rpartition(":")
    words = [word.strip() for word in listed.split(",")]
    if not all(words):
        raise ValueError(f"`words` must be separated by single commas, got {entry!r}. Write `cat,dog=0.5`.")
    if not 0 <= moment <= 1:
        raise ValueError(
            f"`words` must have a moment from 0 to 1, the share of completions with one of the words, got {moment:g} "
            f"in {entry!r}."
        )
    return name or words[0], contains_words(words)
