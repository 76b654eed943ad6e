"""The `Parameters:` of a configuration's docstring, from the `help` of its fields: each is explained once."""

import dataclasses
import inspect
import textwrap
from typing import TypeVar

_PACKAGE = __name__.partition(".")[0]
Config = TypeVar("Config", bound=type)


def document_fields(config: Config) -> Config:
    """
    Class decorator that adds `Parameters:` to the docstring of a dataclass, from the `help` of its fields.

    The list holds the fields that this package declares, the class's own first; TRL documents its own.

    Args:
        config (`type`): a dataclass, each of whose listed fields has a `help` in its metadata.

    Returns:
        `type`: the same class.

    Raises:
        ValueError: if a field of this package has no `help`.
    """
    entries: dict[str, str] = {}
    for cls in config.__mro__:
        if not cls.__module__.startswith(f"{_PACKAGE}."):
            continue
        for name in inspect.get_annotations(cls):
            field = config.__dataclass_fields__[name]
            if "help" not in field.metadata:
                raise ValueError(f"`{name}` of {config.__name__} must have a `help` in its metadata, got none.")
            kind = inspect.formatannotation(field.type).removesuffix(" | None")
            default = "" if field.default in (None, dataclasses.MISSING) else f", defaults to `{field.default!r}`"
            text = textwrap.fill(field.metadata["help"], 115, initial_indent=" " * 4, subsequent_indent=" " * 4)
            entries.setdefault(name, f"{name} (`{kind}`, *optional*{default}):\n{text}")
    parameters = textwrap.indent("\n".join(entries.values()), " " * 4)
    config.__doc__ = f"{inspect.cleandoc(config.__doc__ or '')}\n\nParameters:\n{parameters}\n"
    return config
