"""TRL's parser of flags and `--config`, with one way to write lists, and the nearest flag where one is unknown."""

import sys
from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from rlhf_bayes.commands.suggestions import SuggestingParser


class FlagParser(TrlParser, SuggestingParser):
    """
    [`~trl.TrlParser`] with one way to write lists.

    `--flag 1 2`, `--flag [1,2]` and, in the file of `--config`, `flag: [1, 2]` are the same list. Where a list is
    meant, a single value is a list of one. Where a text or a list is meant, one value is a text.

    Args:
        dataclass_types (`Sequence[type]`):
            The dataclasses to fill.
        **options:
            Those of `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: Sequence[type], **options: Any):
        super().__init__(dataclass_types, **options)
        # a type `str | list[str]`, such as that of `report_to`, is a text for transformers' parser
        self._one_or_more = {
            name
            for of in dataclass_types
            for name, hint in get_type_hints(of).items()
            if str in get_args(hint) and any(get_origin(part) is list for part in get_args(hint))
        }
        for action in self._actions:
            if action.dest in self._one_or_more:
                action.nargs = "+"

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        for name in self._one_or_more:
            value = getattr(found, name, None)
            if isinstance(value, list) and len(value) == 1:
                setattr(found, name, value[0])
        return found, unknown

    def parse_args_and_config(self, args: Sequence[str] | None = None, **options: Any) -> tuple:
        """
        The dataclasses, filled from the words of a command line and from the file that `--config` names.

        Args:
            args (`Sequence[str]`, *optional*):
                The words. Default: those of the process.
            **options:
                As in [`~trl.TrlParser`].

        Raises:
            ValueError: if the file holds a name that is no flag.
        """
        words = self._with_lists(list(sys.argv[1:] if args is None else args))
        self._check_config(words)
        return super().parse_args_and_config(words, **options)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Set defaults; a text or a number where a flag takes a list becomes a list."""
        lists = {action.dest: action for action in self._actions if action.nargs == "+"}
        for name, value in values.items():
            if name in lists and value is not None:
                kind = lists[name].type
                values[name] = [kind(entry) if callable(kind) else entry for entry in _as_list(value)]
        return super().set_defaults_with_config(**values)

    def _with_lists(self, words: list[str]) -> list[str]:
        """The words, with `[a,b]` after a flag that takes a list as two words."""
        lists = {option for action in self._actions if action.nargs == "+" for option in action.option_strings}
        found: list[str] = []
        while words:
            flag, equals, first = words.pop(0).partition("=")
            if flag not in lists:
                found.append(f"{flag}{equals}{first}")
                continue
            values = [first] if equals else []
            while words and not words[0].startswith("--"):
                values.append(words.pop(0))
            # a shell splits `[-1, 1]` at the space
            joined = " ".join(values)
            found += [flag, *(map(str, _as_list(joined)) if joined.startswith("[") else values)]
        return found

    def _check_config(self, words: list[str]) -> None:
        if "--config" not in words[:-1]:
            return
        path = words[words.index("--config") + 1]
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
        known = {action.dest for action in self._actions} | {"env"}
        for name in config if isinstance(config, dict) else ():
            if name not in known:
                raise ValueError(f"{path} must hold names of flags only, got {name!r}. {self._nearest(f'--{name}')}")


def _as_list(value: Any) -> list:
    """A list as it is; of a text like `[-1, 1]` what it says; of any other value a list of one."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            found = yaml.safe_load(value)
        except yaml.YAMLError:
            found = None
        if isinstance(found, list):
            return found
        raise ValueError(f"A list must be written as `[a, b]`, got {value!r}. Close the bracket, or write `a b`.")
    return [value]
