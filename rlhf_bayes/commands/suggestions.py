"""Parsers that name the nearest flag where one is not known, and show no wall of usage with an error."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn


def meant(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known word that is closest, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"Is {close[0]} meant?" if close else f"There are {', '.join(names)}."


class SuggestingParser(argparse.ArgumentParser):
    """
    A parser of flags that refuses unknown ones, and names the nearest.

    Args:
        renamed (`Mapping[str, str]`, *optional*):
            Former spelling -> flag of today. The former still works, with a warning.
        **options:
            Those of `argparse.ArgumentParser`. Flags cannot be abbreviated.
    """

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **options: Any):
        super().__init__(*args, **{**options, "allow_abbrev": False})
        self.renamed = dict(renamed or {})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = [self._of_today(word) for word in (sys.argv[1:] if args is None else args)]
        found, unknown = super().parse_known_args(words, namespace)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        if flags:
            self.error(f"{flags[0]} is not one of the flags. {self._nearest(flags[0])}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def _of_today(self, word: str) -> str:
        """The word, with the flag's name of today, and with _ for - where a flag is spelled so."""
        if not word.startswith("--"):
            return word
        flag, equals, value = word.partition("=")
        known = self._option_string_actions
        if flag in self.renamed:
            print(f"{self.prog}: {flag} is called {self.renamed[flag]} now.", file=sys.stderr)
            flag = self.renamed[flag]
        elif flag not in known and (underscored := "--" + flag[2:].replace("-", "_")) in known:
            flag = underscored
        return f"{flag}{equals}{value}"

    def _nearest(self, flag: str) -> str:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        underscored = "--" + flag[2:].replace("-", "_")
        close = difflib.get_close_matches(underscored, known, n=1)
        return f"Is {close[0]} meant?" if close else "`--help` lists those that matter."
