"""`rlhf-bayes claims`: tests claims of the paper by runs, and writes one page on all of them."""

import argparse
import ast
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

# in an installed wheel, and in a clone: the scripts are recipes, which the package does not import
_FOLDERS = (Path(__file__).parent / "claim_scripts", Path(__file__).parents[2] / "recipes" / "claims")
# in the order in which they are run; the first ones take seconds
_ORDER = (
    "equivalences",
    "collapse",
    "dissociation",
    "frontier",
    "conditional",
    "prototype",
    "criticism",
    "overoptimization",
    "points",
    "two_turns",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Parse the arguments after `rlhf-bayes claims`, and run the scripts of the claims one after another.

    A claim that fails does not stop the others. The exit status is then 1.

    Raises:
        FileNotFoundError: if the scripts are neither in the package nor in `recipes/claims` of a clone.
    """
    scripts = _scripts()
    parser = argparse.ArgumentParser(
        prog="rlhf-bayes claims",
        description="Tests claims of Korbak, Perez & Buckley 2022 by runs: a figure, a table and a verdict for each, "
        "and one page on all. Results are kept, so a command that was stopped goes on where it was.",
        epilog="claims:\n"
        + "\n".join(f"  {name:<18} {_title(script)}" for name, script in scripts.items())
        + "\n\nOther flags are passed on to each claim; `rlhf-bayes claims <name> --help` lists those of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims to test. Default: all")
    first = next((index for index, word in enumerate(arguments or []) if word.startswith("-")), None)
    words = list(arguments or [])
    names, flags = (words, []) if first is None else (words[:first], words[first:])
    if not names and flags and flags[0] in ("-h", "--help"):
        parser.print_help()
        return
    chosen = parser.parse_args(names).names or list(scripts)
    for name in chosen:
        if name not in scripts:
            parser.error(f"NAME must be one of {', '.join(scripts)}, got {name!r}")
    failed = [name for name in chosen if not _run(scripts[name], flags)]
    if failed:
        Console(stderr=True).print(f"Not finished: {', '.join(failed)}.", highlight=False)
        raise SystemExit(1)


def _run(script: Path, flags: Sequence[str]) -> bool:
    """Run a script in this process, as Python would, and say whether it ended well: imports take longer than some."""
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[:] = [str(script), *flags], [str(script.parent), *sys.path]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        return not ended.code
    except KeyboardInterrupt as stop:
        stop.add_note("What was measured is kept: the same command goes on.")
        raise
    except Exception:
        traceback.print_exc()
        return False
    finally:
        sys.argv, sys.path[:] = before
    return True


def _scripts() -> dict[str, Path]:
    """Name -> script of each claim."""
    for folder in _FOLDERS:
        if folder.is_dir():
            return {name: folder / f"{name}.py" for name in _ORDER}
    raise FileNotFoundError(
        f"the scripts of the claims must be in one of {', '.join(map(str, _FOLDERS))}, got neither. Install the "
        "wheel, or run this in a clone."
    )


def _title(script: Path) -> str:
    """The first line of a script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").split("\n", 1)[0].rstrip(".")
