"""The README stays true: its tree names the files that exist, and its Python runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree_paths() -> set[str]:
    """Paths of the files in the tree: `├── name` hangs four columns right of its folder."""
    (tree,) = re.findall(r"^```\n(recipes/.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    paths, folders = set(), []
    for line in tree.splitlines():
        prefix, name = re.match(r"^((?:[│ ]   )*(?:[├└]── )?)(\S+)", line).groups()
        path = "/".join([*folders[: len(prefix) // 4], name.rstrip("/")])
        if name.endswith("/"):
            folders = [*folders[: len(prefix) // 4], name.rstrip("/")]
        paths.add(path)
    return paths


def test_the_tree_names_nothing_that_does_not_exist():
    assert [path for path in sorted(tree_paths()) if not (ROOT / path).exists()] == []


def test_the_tree_names_every_module():
    modules = {
        path.relative_to(ROOT).as_posix()
        for folder in ("rlhf_bayes", "recipes", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py" and "site-packages" not in path.parts  # a benchmark builds an environment there
    }
    assert sorted(modules - tree_paths()) == [], "add a line to the README's tree"


@pytest.mark.slow
def test_the_python_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    scope = {}
    for block in blocks:  # one after the other, as a reader would
        exec(block, scope)
    assert scope["log_weights"].shape == (8,)
    assert scope["log_weights"].isfinite().all()
    assert scope["draws"].guarantee == "exact"
    assert scope["found"].verdict.startswith(("KL(policy‖posterior) is", "Cannot tell"))
