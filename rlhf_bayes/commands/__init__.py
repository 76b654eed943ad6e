"""The console script `rlhf-bayes`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

_COMMANDS = {
    "claims": "test the claims of the paper by runs, and write one page of HTML on all of them",
    "export": "a reward model as one classifier that plain transformers reads",
    "memory": "predict how much memory PPO needs, by role",
    "merge": "merge adapters into their base, for programs that do not read adapters",
    "report": "one page of HTML, and PNGs, on one or several runs",
    "sample": "draw from a posterior without training, and see what other β would give",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name. Wrong input ends it with one line and status 2."""
    parser = argparse.ArgumentParser(
        prog="rlhf-bayes",
        description="RLHF as Bayesian inference. `rlhf-bayes <command> --help` lists the arguments of a command.",
        epilog="\n".join(f"  {name:<8} {purpose}" for name, purpose in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=list(_COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    # only the command that is run is imported: trl takes seconds to import, and the report does not need it
    command = import_module(f".{args.command}", __name__)
    try:
        command.main(args.arguments)
    except (OSError, TypeError, ValueError) as error:
        print(f"rlhf-bayes {args.command}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
