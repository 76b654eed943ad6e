"""Public functions and methods with four or more parameters explain them, or name the documented one that has them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "rlhf_bayes"
MANY = 4
# "Arguments are those of [`Sampler.sample`].", "Arguments and errors are those of [`checked_evidence`]."
ELSEWHERE = re.compile(r"Arguments(?:\s+and\s+errors)?\s+are\s+those\s+of\s+\[`~?([\w.]+)`\]")
OF_TRL = re.compile(r"in TRL's protocol of reward functions|Not for direct use")


class Documented(NamedTuple):
    where: str
    name: str  # with its class, for a method
    parameters: tuple[str, ...]
    docstring: str | None


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    variable = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return tuple(argument.arg for argument in [*named, *variable] if argument.arg not in ("self", "cls"))


def public_functions(path: Path, tree: ast.Module) -> Iterator[Documented]:
    """Functions of a module and methods of its public classes; a constructor has the docstring of its class."""
    bodies = [("", tree, None)]
    bodies += [
        (f"{node.name}.", node, ast.get_docstring(node)) for node in tree.body if isinstance(node, ast.ClassDef)
    ]
    for prefix, body, of_class in bodies:
        for node in body.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or prefix.startswith("_"):
                continue
            if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
                continue
            own = ast.get_docstring(node)
            docstring = of_class if node.name == "__init__" and own is None else own
            where = f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"
            yield Documented(where, f"{prefix}{node.name}", parameters_of(node), docstring)


def explained(docstring: str) -> set[str]:
    """Names of the entries of `Args:` or `Parameters:`; several may share an entry."""
    section = re.search(r"^(?:Args|Parameters):\n((?:(?: .*)?\n?)*)", docstring, re.MULTILINE)
    lines = [] if section is None else section[1].splitlines()
    # an entry is indented once; "a, b, c:" may go on in the next line
    entries = [line.strip() for line in lines if re.match(r" {4}\S", line)]
    return {name for entry in entries for name in re.findall(r"\w+", re.split(r" \(|:", entry)[0])}


def complaints(package: Path = PACKAGE) -> list[str]:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    functions = [function for path, tree in trees.items() for function in public_functions(path, tree)]
    classes = {
        node.name: ast.get_docstring(node) or ""
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    documented = {name for name, docstring in classes.items() if explained(docstring)}
    documented |= {function.name for function in functions if function.docstring and explained(function.docstring)}
    found = []
    for function in functions:
        # a method without a docstring overrides one of a library, which documents it
        inherits = "." in function.name and function.docstring is None
        if len(function.parameters) < MANY or inherits:
            continue
        docstring = function.docstring or ""
        if OF_TRL.search(docstring):
            continue
        elsewhere = [name.removeprefix("rlhf_bayes.") for name in ELSEWHERE.findall(docstring)]
        unknown = [name for name in elsewhere if name not in documented]
        missing = [] if elsewhere else [name for name in function.parameters if name not in explained(docstring)]
        if unknown:
            found.append(f"{function.where}: {function.name} refers to {unknown[0]}, which has no `Args:`")
        elif missing:
            found.append(f"{function.where}: {function.name} does not explain {', '.join(missing)}")
    return found


def test_functions_with_many_parameters_explain_them():
    found = complaints()
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ('def f(a, b, c, d):\n    """Does."""\n', "f does not explain a, b, c, d"),
        (
            'def f(a, b, c, d):\n    """\n    Does.\n\n    Args:\n        a, b, c: Numbers.\n    """\n',
            "f does not explain d",
        ),
        ('def f(a, b, c, d):\n    """Does. Arguments are those of [`g`]."""\n', "f refers to g, which has no `Args:`"),
        (
            'class A:\n    """Is."""\n    def __init__(self, a, b, c, d):\n        pass\n',
            "A.__init__ does not explain",
        ),
        ("def f(a, b, c, d):\n    pass\n", "f does not explain a, b, c, d"),
    ],
)
def test_a_function_that_explains_too_little_is_found(tmp_path, monkeypatch, source, complaint):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "module.py").write_text(source)
    (found,) = complaints(tmp_path)
    assert complaint in found
