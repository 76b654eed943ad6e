"""Looks up names in TRL that a module relies on. Not a test module."""

import ast
import inspect
from pathlib import Path
from types import ModuleType


def moved(owner, names: dict[str, tuple[str, ...]]) -> list[str]:
    """What is wrong with the functions that `owner` itself should define with these leading parameters."""
    problems = []
    for name, parameters in names.items():
        if name not in vars(owner):
            problems.append(f"{owner.__name__}.{name} is gone")
            continue
        actual = [parameter for parameter in inspect.signature(vars(owner)[name]).parameters if parameter != "self"]
        if tuple(actual[: len(parameters)]) != parameters:
            problems.append(f"{owner.__name__}.{name} takes {actual}, not {list(parameters)} first")
    return problems


def names_used(module: ModuleType, trainer: str) -> set[str]:
    """Attributes of the trainer that a module uses and does not define."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == trainer]
    used = set()
    own = {item.target.id for item in classes[0].body if isinstance(item, ast.AnnAssign)}
    for node in ast.walk(classes[0]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()"):
            used.add(node.attr)
        if isinstance(node, ast.FunctionDef):
            own.add(node.name)
            if node.name == "__init__":
                own |= {
                    item.attr
                    for item in ast.walk(node)
                    if isinstance(getattr(item, "ctx", None), ast.Store) and isinstance(item, ast.Attribute)
                }
    called_above = {
        node.attr
        for node in ast.walk(classes[0])
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()"
    }
    return used - own | called_above - {"__init__"}


def lost(instance, names) -> list[str]:
    kind = next(kind for kind in type(instance).__mro__ if kind.__module__.startswith("trl."))
    return [f"{kind.__name__} has no `{name}`" for name in sorted(names) if not hasattr(instance, name)]
