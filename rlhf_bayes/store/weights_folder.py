"""The folder between a learner and its actors: weights of the policy, and how far the learner has read the store."""

import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from safetensors.torch import load_file, save_file
from torch import Tensor

_WANTED, _STOP, _JOURNAL = "learner.json", "stop", "read.txt"
_VERSION, _WEIGHTS = "version-", "policy.safetensors"
_KEPT = 2  # versions: an actor may be reading the one before the newest


class PolicyVersion(NamedTuple):
    """Weights that a learner pushed."""

    step: int
    """The optimizer step after which they were pushed."""
    run: str
    """The start of the learner that pushed them: one that is resumed may come to other weights at the same step."""
    path: Path

    @property
    def name(self) -> str:
        """Equal names mean equal weights."""
        return f"policy of run {self.run} at step {self.step}"

    def weights(self) -> dict[str, Tensor]:
        """Name -> trained weight, on the CPU."""
        return load_file(self.path / _WEIGHTS)


@final
@dataclass(frozen=True)
class Wanted:
    """What a learner asks of actors."""

    run: str
    """The start of the learner: see [`PolicyVersion`]."""
    num_prompts: int
    """Prompts in a file of the store, which is a rollout of the learner."""
    num_generations: int
    """Completions of each of them."""
    max_unread: int
    """Files that the learner has not read yet, from which on actors wait: more would be too old when they are read."""


@final
class WeightsFolder:
    """
    What a learner and its actors say to each other, as files. Each appears under its name when all of it is written.

    Args:
        path (`str` or `Path`):
            The folder, which all of them reach. It is made where there is none.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.journal = self.path / _JOURNAL
        """Names of the files of the store that the learner has read, in the order in which it read them."""

    def begin(self, wanted: Wanted) -> None:
        """Say what is wanted. Called by the learner when it starts or goes on."""
        (self.path / _STOP).unlink(missing_ok=True)
        for cut in self.path.glob(".*"):  # what a learner that was killed had begun to write
            shutil.rmtree(cut) if cut.is_dir() else cut.unlink()
        unfinished = self.path / f".{uuid.uuid4().hex[:8]}"
        unfinished.write_text(json.dumps(asdict(wanted)), encoding="utf-8")
        unfinished.replace(self.path / _WANTED)

    def push(self, step: int, run: str, weights: Mapping[str, Tensor], adapter: Any = None) -> None:
        """
        Publish weights as the newest version, and remove older ones.

        Args:
            step (`int`): The optimizer steps so far.
            run (`str`): The start of the learner.
            weights (`Mapping[str, Tensor]`): Name -> trained weight.
            adapter (`PeftConfig`, *optional*): Of the adapter that they belong to, where not all weights are trained.
        """
        unfinished = self.path / f".{uuid.uuid4().hex[:8]}"
        unfinished.mkdir()
        save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, unfinished / _WEIGHTS)
        if adapter is not None:
            adapter.save_pretrained(str(unfinished))
        unfinished.rename(self.path / f"{_VERSION}{step:08d}-{run}")
        # those of a start that got further than this one, before it was killed, count as older
        versions = sorted(self._versions(), key=lambda version: (version.run == run, version.step))
        for version in versions[:-_KEPT]:
            shutil.rmtree(version.path, ignore_errors=True)

    def stop(self) -> None:
        """Tell actors to end. So does anyone who makes the file `stop` in the folder."""
        (self.path / _STOP).touch()

    @property
    def stopped(self) -> bool:
        """Whether actors are to end."""
        return (self.path / _STOP).exists()

    def wanted(self) -> Wanted | None:
        """What the learner asks for; None where none has started."""
        file = self.path / _WANTED
        return Wanted(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def newest(self, run: str) -> PolicyVersion | None:
        """The newest weights that a start of the learner has pushed; None where it has not pushed any yet."""
        return max((version for version in self._versions() if version.run == run), default=None)

    def num_read(self) -> int:
        """How many files of the store the learner has read."""
        return self.journal.read_bytes().count(b"\n") if self.journal.is_file() else 0

    def _versions(self) -> list[PolicyVersion]:
        found = []
        for path in self.path.glob(f"{_VERSION}*"):
            step, run = path.name.removeprefix(_VERSION).split("-")
            found.append(PolicyVersion(int(step), run, path))
        return found
