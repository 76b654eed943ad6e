"""
What the site adds to mkdocs: pages on the public names, links between docstrings, and formulas as MathML.

mkdocs calls the functions that begin with `on_`. The package is read, not imported: the site is built without torch.
"""

import ast
import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
API = (
    "trainers",
    "posterior",
    "lm",
    "likelihoods",
    "rewards",
    "samplers",
    "diagnostics",
    "objectives",
    "store",
    "numerics",
)
API_FOR_TESTS = ("testing", "toy")

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
# a name as code; in brackets it is a link in TRL's format, [`~package.Name`]
_NAME = re.compile(r"(<a\b[^>]*>|<pre\b[^>]*>)?(\[?)<code>~?([\w.]+)</code>(\]?)")
_BRACKETED_IN_CODE = re.compile(r"\[`~?(?:\w+\.)*(\w+)`\]")
# the type of an argument in TRL's format, (`int`, *optional*), which mkdocstrings shows as code
_TYPE = re.compile(r"<code>([^<]*`[^<]*)</code>")


def public_names(part: str) -> dict[str, str]:
    """
    The public names of a part of the package with their full paths, in the order of its imports or definitions.

    Args:
        part (`str`): a package or a module below `rlhf_bayes`.
    """
    path = ROOT / "rlhf_bayes" / part
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    public: set[str] | None = None
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = f"rlhf_bayes.{part}.{node.name}"
        elif isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            public = set(ast.literal_eval(node.value))
    if public is None:  # the names that are defined here
        public = {name for name, home in names.items() if home.startswith(f"rlhf_bayes.{part}.") and name[0] != "_"}
    return {name: home for name, home in names.items() if name in public}


HOMES = {name: home for part in (*API, *API_FOR_TESTS) for name, home in public_names(part).items()}


def api_page(part: str) -> str:
    """The page on the public names of a part, in Markdown with the directives of mkdocstrings."""
    path = ROOT / "rlhf_bayes" / part
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    entries = "\n\n".join(f"::: {home}" for home in public_names(part).values())
    return f"# rlhf_bayes.{part}\n\n{docstring}\n\n{entries}\n"


def notebook_page(script: Path) -> str:
    """The page of a notebook, a Python script whose cells begin with `# %%`, as jupytext reads them."""
    parts = []
    for cell in re.split(r"^# %%", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append(
                re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE) if body[0] == "#" else body.strip('"\n')
            )
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return (
        "\n\n".join(parts)
        + f"\n\nThis page is `examples/notebooks/{script.name}`; `make notebooks` writes it for Jupyter.\n"
    )


def on_files(files, config, **_):
    """Adds the pages on the public names, and those of the notebooks."""
    pages = {f"api/{part}.md": api_page(part) for part in (*API, *API_FOR_TESTS)}
    scripts = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
    pages |= {f"notebooks/{script.stem}.md": notebook_page(script) for script in scripts}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_content(content: str, **_) -> str:
    """Turns formulas into MathML, which needs no script or font, and names of the package into links."""
    content = _FORMULA.sub(lambda found: convert(html.unescape(found[2]), display=_display(found[1])), content)
    content = _BRACKETED_IN_CODE.sub(r"\1", _NAME.sub(_linked, content))
    return _TYPE.sub(lambda found: f"<code>{found[1].replace('`', '').replace('*', '')}</code>", content)


def _display(tag: str) -> str:
    return "block" if tag == "div" else "inline"


def _linked(found: re.Match) -> str:
    """A name as a link to the reference: every name in brackets, and every class."""
    around, opening, path, closing = found.groups()
    name = path.rpartition(".")[2]
    bracketed = bool(opening and closing)
    if around or not (bracketed or (name in HOMES and name[0].isupper())):
        return found[0]
    code = f"<code>{name}</code>"
    linked = f'<autoref identifier="{HOMES[name]}" optional>{code}</autoref>' if name in HOMES else code
    return linked if bracketed else f"{opening}{linked}{closing}"
