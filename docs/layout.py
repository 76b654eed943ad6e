"""
Writes layout.md, the tree of the repository: one line a file, which is the first sentence of its docstring.

    python docs/layout.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("rlhf_bayes", "recipes", "reward_models", "examples", "benchmarks")
HEADER = """# Layout

Written by `python docs/layout.py` from the docstrings of the modules. Imports go down only; `tests/test_layers.py`
holds the layer of each part, and enforces it.

"""


def first_sentence(path: Path) -> str:
    """The first sentence of the docstring of a module or a package, in one line; of a folder of scripts, its title."""
    source = path / "__init__.py" if path.is_dir() else path
    if not source.is_file():
        readme = path / "README.md"
        return readme.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") if readme.is_file() else ""
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split()).removeprefix("# ")  # the title of a notebook
    return paragraph.split(". ")[0].rstrip(".:")


def entries(folder: Path) -> list[Path]:
    """Modules of a folder, then the folders in it that hold modules."""
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py")))
    return [*files, *(path for path in folders if not path.name.startswith((".", "__")))]


def lines(folder: Path, indent: str = "") -> Iterator[str]:
    """A line for each file and folder below."""
    for path in entries(folder):
        name = f"{path.name}/" if path.is_dir() else path.name
        yield f"{indent}- `{name}`: {first_sentence(path)}".rstrip(": ")
        if path.is_dir():
            yield from lines(path, indent + "  ")


def layout() -> str:
    """The whole page."""
    parts = [f"## `{name}/`\n\n{first_sentence(ROOT / name)}\n\n" + "\n".join(lines(ROOT / name)) for name in FOLDERS]
    return HEADER + "\n\n".join(part.replace("\n\n\n\n", "\n\n") for part in parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "layout.md").write_text(layout(), encoding="utf-8")
