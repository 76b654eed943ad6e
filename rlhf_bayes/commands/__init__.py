"""`rlhf-bayes COMMAND`: what can be asked without a script."""

import argparse

from . import memory

_COMMANDS = {"memory": memory}


def main(arguments: list[str] | None = None) -> None:
    """Run the command that is named on the command line."""
    parser = argparse.ArgumentParser(prog="rlhf-bayes", description="RLHF as Bayesian inference.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__, description=module.__doc__))
    args = parser.parse_args(arguments)
    _COMMANDS[args.command].run(args)
