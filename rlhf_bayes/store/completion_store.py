"""A folder of scored completions: files that are only ever added, and a record of what made them."""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from rlhf_bayes.store.provenance import Provenance
from rlhf_bayes.store.scored_completion import DENSITY, FEATURE, REWARD, ScoredCompletion

logger = logging.getLogger(__name__)

MANIFEST = "store.json"
VERSION = 1
_UNFINISHED = ".unfinished"
_SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "is_chat": pa.bool_(),
        "columns": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "completion": pa.string(),
        "completion_ids": pa.list_(pa.int32()),
        "ended": pa.bool_(),
        "log_prior": pa.float64(),
        "log_proposal": pa.float64(),
        "drawn_by": pa.string(),
        "step": pa.int64(),
    }
)


def is_store(path: str | Path) -> bool:
    """Whether a folder is a store."""
    return (Path(path) / MANIFEST).is_file()


@final
class CompletionStore:
    """
    Completions with their log-probabilities, raw rewards and features, in a folder.

    Each write adds one parquet file, which appears under its name only when all of it is on the disk. Files have names
    of their own, so several processes may write at the same time. `datasets.load_dataset("parquet",
    data_files="DIR/*.parquet")` reads them without this package.

    Args:
        path (`str` or `Path`):
            A folder that [`CompletionStore.create`] made.

    Attributes:
        provenance ([`Provenance`]): what the numbers were made by.
        incomplete (`list[str]`): names of files that were not written to the end, found at the last reading.

    Raises:
        ValueError: if the folder is no store, or one of a later version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.provenance = _read_manifest(self.path)
        self.incomplete: list[str] = []
        self._tables: dict[str, pa.Table] = {}

    @classmethod
    def create(cls, path: str | Path, provenance: Provenance) -> "CompletionStore":
        """
        A store to write to: a new one, or the one that is there if it was made by the same.

        Args:
            path (`str` or `Path`):
                The folder.
            provenance ([`Provenance`]):
                What the numbers are made by.

        Raises:
            ValueError: if the folder is a store made by another prior, tokenizer, reward or setting, or is no store
                and not empty.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if not is_store(folder):
            others = [entry.name for entry in folder.iterdir() if not entry.name.endswith(_UNFINISHED)]
            if others and not is_store(folder):  # another process may have made it meanwhile
                raise ValueError(
                    f"`store` must be a store, an empty folder or a new one, got {str(folder)!r}, which holds "
                    f"{sorted(others)[0]!r}. Name another folder."
                )
            _write_manifest(folder, provenance)
        store = cls(folder)
        provenance.check_same(store.provenance, "store", folder)
        return store

    def append(self, completions: Iterable[ScoredCompletion], name: str | None = None) -> None:
        """
        Write completions as a file of their own: all of them, or none.

        Args:
            completions (`Iterable[ScoredCompletion]`):
                What was drawn, with its scores. Nothing is written if there is none.
            name (`str`, *optional*):
                Name of the file, without its ending. A file of this name is replaced: a run that is resumed writes
                the same draws again. Default: a name that follows all others.

        Raises:
            ValueError: if a number cannot be stored, or the rewards are not those of the store.
            OSError: if the file cannot be written, for instance on a full disk. What was there stays.
        """
        rows = [completion.as_row() for completion in completions]
        if not rows:
            return
        self._check_rewards(rows)
        target = self.path / f"{self._next_name() if name is None else name}.parquet"
        unfinished = target.with_name(f"{target.stem}-{uuid.uuid4().hex[:8]}{_UNFINISHED}")
        try:
            with unfinished.open("wb") as file:
                pq.write_table(_as_table(rows), file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(target)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            free = shutil.disk_usage(self.path).free / 1e6
            error.add_note(
                f"{len(rows)} completions could not be added to the store {str(self.path)!r}, with {free:.1f} MB free "
                "on its disk. What it held before is whole. Free some space and go on from the last checkpoint."
            )
            raise
        self._tables.pop(target.name, None)

    def read(self) -> Dataset:
        """
        All completions, in the order of their files' names.

        Files that were not written to the end are left out, and a warning names them.
        """
        self._read_new()
        if not self._tables:
            return as_dataset([])
        tables = [self._tables[name] for name in sorted(self._tables)]
        return Dataset(pa.concat_tables(tables, promote_options="default").combine_chunks())

    def files(self) -> list[str]:
        """Names of its files, sorted."""
        return sorted(path.name for path in self.path.glob("*.parquet"))

    def rows_of(self, name: str) -> list[dict[str, Any]] | None:
        """The rows of one of its files; None where the file was not written to the end, or is not there."""
        table = self._table_of(name)
        return None if table is None else table.to_pylist()

    def __len__(self) -> int:
        self._read_new()
        return sum(len(table) for table in self._tables.values())

    @property
    def reward_names(self) -> list[str]:
        """The reward functions whose values are stored."""
        return list(self.provenance.rewards)

    def _read_new(self) -> None:
        unfinished = sorted(path.name for path in self.path.glob(f"*{_UNFINISHED}"))
        for name in self.files():
            if name in self._tables:
                continue
            table = self._table_of(name)
            if table is None:
                unfinished.append(name)
            else:
                self._tables[name] = table
        if unfinished and unfinished != self.incomplete:
            logger.warning(
                f"The store {str(self.path)!r} has {len(unfinished)} file(s) that were not written to the end, or are "
                f"being written: {', '.join(unfinished[:5])}. They are left out; the other files are whole."
            )
        self.incomplete = unfinished

    def _table_of(self, name: str) -> pa.Table | None:
        try:
            return pq.read_table(self.path / name)
        except (pa.ArrowException, OSError) as error:
            logger.debug("%s: %s", self.path / name, error)
            return None

    def _next_name(self) -> str:
        numbers = [int(path.name.split("-")[0]) for path in self.path.glob("[0-9]*-*.parquet")]
        return f"{max(numbers, default=-1) + 1:08d}-{uuid.uuid4().hex[:8]}"

    def _check_rewards(self, rows: list[dict[str, Any]]) -> None:
        wanted = {REWARD + name for name in self.provenance.rewards}
        for row in rows:
            found = {name for name in row if name.startswith(REWARD)}
            if found != wanted:
                raise ValueError(
                    f"`completions` must have the rewards of the store, {sorted(wanted)}, got {sorted(found)}. Score "
                    "them by the same functions, or keep other scores as features."
                )


def as_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Rows that [`CompletionStore.rows_of`] gave, as [`CompletionStore.read`] gives all."""
    return Dataset(_as_table(rows))


def _as_table(rows: list[dict[str, Any]]) -> pa.Table:
    scores = dict.fromkeys(name for row in rows for name in row if name.startswith((REWARD, FEATURE, DENSITY)))
    schema = pa.schema([*_SCHEMA, *(pa.field(name, pa.float64()) for name in scores)])
    return pa.Table.from_pylist(rows, schema=schema)


def _write_manifest(folder: Path, provenance: Provenance) -> None:
    unfinished = folder / f"{MANIFEST}-{uuid.uuid4().hex[:8]}{_UNFINISHED}"
    text = json.dumps({"version": VERSION, **provenance.as_dict()}, indent=1, ensure_ascii=False)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        # a link fails where another process was faster, and its record stays
        os.link(unfinished, folder / MANIFEST)
    except FileExistsError:
        pass
    finally:
        unfinished.unlink(missing_ok=True)


def _read_manifest(folder: Path) -> Provenance:
    if not is_store(folder):
        raise ValueError(
            f"`path` must be a store, got {str(folder)!r}, which has no `{MANIFEST}`. `rlhf-bayes sample --store DIR` "
            "makes one, and `store=` of a trainer's configuration."
        )
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    version = content.pop("version", None)
    if version != VERSION:
        raise ValueError(
            f"`path` must be a store of version {VERSION}, got {str(folder)!r} of version {version}. Read it with the "
            "version of rlhf_bayes that wrote it."
        )
    return Provenance(**content)
