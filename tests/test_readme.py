"""The README and the layout stay true: every file is named, and the Python runs."""

import re
from pathlib import Path

from .scripts import loaded_script

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_layout_is_that_of_the_files():
    with loaded_script(ROOT / "docs" / "layout.py") as script:
        written = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
        assert written == script.layout(), "write it anew: python docs/layout.py"
        silent = [line for line in written.splitlines() if line.lstrip().startswith("- ") and ": " not in line]
    assert silent == [], "begin these modules with a docstring"


def test_the_python_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    scope = {}
    for block in blocks:  # one after the other, as a reader would
        exec(block, scope)
    assert scope["log_weights"].shape == (8,)
    assert scope["log_weights"].isfinite().all()
    assert scope["draws"].guarantee == "exact"
    assert scope["found"].verdict.startswith(("KL(policy‖posterior) is", "Cannot tell"))
