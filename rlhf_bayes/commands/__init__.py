"""The console script `rlhf-bayes`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A command: the module that holds its `main` or `run`, and what it does, for `--help`."""

    module: str
    purpose: str


COMMANDS = {
    "ppo": Command("train_ppo", "train a policy by PPO towards the posterior of a reward"),
    "gdc": Command("train_gdc", "train a policy so that features of its completions have given means"),
    "reward": Command("train_reward", "train a reward model, or an ensemble, from preferences"),
    "sample": Command("sample", "draw from a posterior without training, and see what other β would give"),
    "what-if": Command("stored_what_if", "what other β, weights or clipping would give, from a store of completions"),
    "actor": Command("run_actor", "draw from a policy while another process trains it, into the store it learns from"),
    "report": Command("report", "one page of HTML, and PNGs, on one or several runs"),
    "memory": Command("memory", "predict how much memory PPO needs, by role"),
    "merge": Command("merge", "merge adapters into their base, for programs that do not read adapters"),
    "export": Command("export", "a reward model as one classifier that plain transformers reads"),
    "claims": Command("claims", "test the claims of the paper by runs, and write one page of HTML on all of them"),
    "env": Command("environment", "versions and devices, for a report of a bug"),
}
"""Name -> command, in the order of `--help`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command that the arguments name.

    Wrong input ends it with one line and status 2, Ctrl-C with status 130. Other errors keep their traceback.
    """
    name, *words = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(_help())
        return
    if name not in COMMANDS:
        from rlhf_bayes.commands.suggestions import meant

        wrong = f"{name!r} is no command" if name else "a command must be given"
        print(f"rlhf-bayes: {wrong}. {meant(name, COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    if _shows_help(name, words):
        return
    try:
        _run(name, words)
    except KeyboardInterrupt as stop:
        for line in ["Stopped by Ctrl-C.", *getattr(stop, "__notes__", [])]:
            print(line, file=sys.stderr)
        raise SystemExit(130) from stop
    except Exception as error:
        from rlhf_bayes.commands.wrong_input import in_a_line

        line = in_a_line(error)
        if line is None:
            raise
        print(f"rlhf-bayes {name}: {line}", file=sys.stderr)
        raise SystemExit(2) from error


def _run(name: str, words: list[str]) -> None:
    """Parse the words, where the command has a small parser, and run the command."""
    from rlhf_bayes.commands.parsers import PARSERS

    args = PARSERS[name]().parse_args(words) if name in PARSERS else words
    # only the command that is run is imported: trl takes seconds to import, and the report does not need it
    command = import_module(f".{COMMANDS[name].module}", __name__)
    if "transformers" in sys.modules:
        from rlhf_bayes.commands.quiet import quiet_libraries

        quiet_libraries()
    if name in PARSERS:
        command.run(args)
    else:
        command.main(words)


def _shows_help(name: str, words: list[str]) -> bool:
    """Print the flags that matter, where `--help` asks for them; `--help-all` is asked of the whole parser."""
    from rlhf_bayes.commands.short_help import SHORT_HELP, short_help

    if name not in SHORT_HELP:
        return False
    if "--help-all" in words:
        words[:] = ["--help"]
        return False
    if not {"-h", "--help"} & set(words):
        return False
    print(short_help(name))
    return True


def _help() -> str:
    lines = [f"  {name:<8} {command.purpose}" for name, command in COMMANDS.items()]
    return (
        "usage: rlhf-bayes COMMAND [FLAGS]\n\nRLHF as Bayesian inference. `rlhf-bayes COMMAND --help` lists the flags "
        "of a command.\n\n" + "\n".join(lines)
        + "\n\nOn several devices: accelerate launch -m rlhf_bayes COMMAND [FLAGS]"
    )  # fmt: skip
