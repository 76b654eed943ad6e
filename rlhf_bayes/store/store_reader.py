"""Reads a store that grows, file by file, in an order that a journal keeps."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from rlhf_bayes.store.completion_store import CompletionStore

logger = logging.getLogger(__name__)


@final
class StoreReader:
    """
    The files of a store, each once: first those of the journal, in its order, then what is new, by name.

    Files of several writers arrive in any order. The journal holds the one in which they were read, so that a reader
    that goes on from an earlier position reads the same again, also what another read after that and was then killed.

    Args:
        store ([`CompletionStore`]):
            The store, to which others write.
        journal (`Path`):
            A file with a name in each line, which is added to.

    Attributes:
        taken (`list[str]`): names of the files that were read, in this order.
    """

    def __init__(self, store: CompletionStore, journal: Path):
        self.store, self.journal = store, journal
        self.taken: list[str] = []
        self._cut: set[str] = set()
        self._written = self._read_journal()

    @property
    def num_ahead(self) -> int:
        """Files of the journal that are still to be read."""
        return len(self._written) - len(self.taken)

    def next(self) -> list[dict[str, Any]] | None:
        """
        The rows of the next file; None where there is none yet.

        Raises:
            ValueError: if a file of the journal is no longer in the store.
        """
        position = len(self.taken)
        if position < len(self._written):
            name, rows = self._written[position], self.store.rows_of(self._written[position])
            if rows is None:
                raise ValueError(
                    f"The store {str(self.store.path)!r} must hold the file {name!r}, which was read before "
                    f"({self.journal}), got none that is whole. Put it back, or start anew with another folder as "
                    "`actor_weights`."
                )
            self.taken.append(name)
            return rows
        taken = set(self.taken)
        for name in self.store.files():
            if name in taken:
                continue
            rows = self.store.rows_of(name)
            if rows is None:
                self._warn_of_cut(name)
                continue
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(f"{name}\n")
            self._written.append(name)
            self.taken.append(name)
            return rows
        return None

    def go_on_after(self, taken: Sequence[str]) -> None:
        """Go on as a reader that has read these files."""
        self.taken = list(taken)
        if self._written[: len(self.taken)] != self.taken:  # the journal of another run, or a new one
            self._written = list(self.taken)
            self._write_journal()

    def _warn_of_cut(self, name: str) -> None:
        if name not in self._cut:
            self._cut.add(name)
            logger.warning(f"The file {name} of {str(self.store.path)!r} was not written to the end, and is left out.")

    def _read_journal(self) -> list[str]:
        if not self.journal.is_file():
            return []
        # what comes after the last line break was cut in the middle of a write
        *names, cut = self.journal.read_text(encoding="utf-8").split("\n")
        self._written = names
        if cut:
            self._write_journal()
        return names

    def _write_journal(self) -> None:
        unfinished = self.journal.with_name(f".{self.journal.name}")
        unfinished.write_text("".join(f"{name}\n" for name in self._written), encoding="utf-8")
        unfinished.replace(self.journal)
