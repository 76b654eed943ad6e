"""Reads the settings of a run from what `Trainer` saves, without running any code that the file may hold."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

_ALLOWED = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "OrderedDict"): dict,
}


def read_settings(path: str | Path) -> dict[str, Any]:
    """
    The arguments in a `training_args.bin`: plain values by name, `class` first. Access tokens are left out.

    `torch.load` would import any class that the file names and run its code. Here every class but a few containers is
    replaced by an empty one.

    Raises:
        ValueError: if `torch.save` did not write the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                loaded = _Unpickler(file).load()
    except (zipfile.BadZipFile, ValueError, pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`training_args.bin` must be what `Trainer` saves, got {str(path)!r}, which cannot be read: {error}. "
            "Remove the file to have a report without settings."
        ) from error
    fields = {
        name: _plain(value)
        for name, value in sorted(vars(loaded).items() if isinstance(loaded, _Opaque) else ())
        if not name.startswith("_") and not name.endswith("_token")
    }
    return {"class": type(loaded).__name__, **{name: value for name, value in fields.items() if _is_plain(value)}}


class _Opaque:
    """Stands for an object of any class, and keeps the arguments and the state that it was pickled with."""

    _made_of: tuple[Any, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Opaque":
        instance = super().__new__(cls)
        instance._made_of = args
        return instance

    def __init__(self, *args: Any, **kwargs: Any):
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _ALLOWED.get((module, name)) or type(name, (_Opaque,), {})

    def persistent_load(self, pid: Any) -> None:
        """Leave tensors out: they are not settings."""


def _plain(value: Any) -> Any:
    """The value of an enumeration, the name of a device; other objects stay as they are and are left out later."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not str(key).endswith("_token")}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, _Opaque) and len(value._made_of) == 1:
        return value._made_of[0]
    return value


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
