"""Short descriptions of objects: one line where they are printed, a small table in a notebook."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_LONGEST = 80
"""Characters of a cell; longer texts are cut."""


class Described:
    """Gives a class its `__repr__`, and its table in a notebook, from what `_facts` returns."""

    def _facts(self) -> Mapping[str, Any]:
        """Name -> value, in the order in which they are shown. None is left out."""
        return {}

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={in_short(value)}" for name, value in self._facts().items() if value is not None)
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        rows = [(name, in_short(value)) for name, value in self._facts().items() if value is not None]
        return html_table((), rows, type(self).__name__)


def in_short(value: Any) -> str:
    """A value in one line: a number with few digits; an object without a `__repr__` of its own by its class."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {in_short(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(in_short, value)) + "]"
    if type(value).__repr__ is object.__repr__:
        return f"{type(value).__name__}()"
    return repr(value)


def shortened(text: str) -> str:
    """The text in one line, cut after 80 characters."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", note: str = "") -> str:
    """
    A table for a notebook. All texts are escaped.

    Args:
        header (`Sequence[str]`): titles of the columns; none where it is empty.
        rows (`Iterable[Sequence]`): cells; the first of a row names it.
        caption (`str`): text above the table.
        note (`str`): text below the table.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(_cell(cell, place) for place, cell in enumerate(row))}</tr>" for row in rows)
    parts = [f"<caption>{escape(caption)}</caption>"] if caption else []
    parts += [f"<thead><tr>{head}</tr></thead>"] if head else []
    below = f"<p>{escape(note)}</p>" if note else ""
    return f"<table>{''.join(parts)}<tbody>{body}</tbody></table>{below}"


def _cell(cell: Any, place: int) -> str:
    if place == 0:
        return f'<th style="text-align:left">{escape(str(cell))}</th>'
    return f"<td>{escape(str(cell))}</td>"
