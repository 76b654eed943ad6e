"""`rlhf-bayes memory`: predicts the memory of PPO by role, and compares it with four full models."""

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from rlhf_bayes.commands.footprint import FOUR_MODELS, Footprint, Roles, Run, footprint
from rlhf_bayes.toy import model_path

GIB, MIB = 2**30, 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to a parser."""
    parser.add_argument("--model", default=model_path(), help="Folder or name on the hub. Default: the bundled model.")
    parser.add_argument("--lora", type=int, metavar="R", help="Rank of the policy's adapter; without, all is trained.")
    parser.add_argument(
        "--lora-target-modules", nargs="+", metavar="NAME", help="Names, or all-linear. Default: PEFT's of the family."
    )
    parser.add_argument("--critic", choices=("ridge", "shared", "separate"), default="ridge")
    parser.add_argument(
        "--reward", choices=("function", "adapter", "model"), help="Default: adapter with --lora, else model."
    )
    parser.add_argument("--reward-members", type=int, default=1, help="Of an ensemble.")
    parser.add_argument("--batch", type=int, default=8, help="Sequences of a micro-batch.")
    parser.add_argument("--prompt", type=int, default=128, help="Tokens.")
    parser.add_argument("--completion", type=int, default=128, help="Tokens.")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Of the weights."
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0, help="Stage of DeepSpeed.")
    parser.add_argument("--processes", type=int, default=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments after `rlhf-bayes memory`, and print the table."""
    parser = argparse.ArgumentParser(prog="rlhf-bayes memory", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> None:
    """Print the table for parsed arguments."""
    for name in ("lora", "reward_members", "batch", "prompt", "completion", "processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}.")
    targets = args.lora_target_modules
    roles = Roles(
        lora_r=args.lora,
        lora_target_modules="all-linear" if targets == ["all-linear"] else targets,
        critic=args.critic,
        reward=args.reward or ("model" if args.lora is None else "adapter"),
        reward_members=args.reward_members,
    )
    training = Run(
        args.batch, args.prompt, args.completion, getattr(torch, args.dtype), args.gradient_checkpointing, args.zero,
        args.processes,
    )  # fmt: skip
    config = AutoConfig.from_pretrained(args.model)
    found, four = footprint(config, roles, training), footprint(config, FOUR_MODELS, training)
    console = Console()
    console.print(table(found, four, f"{args.model}: memory of a process"))
    console.print(f"{found.peak / four.peak:.2f} × four full models. Not counted: libraries, fragmentation, buffers.")


def table(found: Footprint, four: Footprint, title: str) -> Table:
    """Roles and phases of a layout, and those of four full models in the last column."""
    unit, name = (GIB, "GiB") if four.peak > 4 * GIB else (MIB, "MiB")
    shown = Table(title=f"{title}, {name}")
    for column in ("", "weights", "gradients", "optimizer", "total", "four full models"):
        shown.add_column(column, justify="left" if not column else "right")
    for role, part in found.roles.items():
        other = four.roles[role]
        cells = [part.weights, part.gradients, part.optimizer]
        total, of_four = sum(cells), other.weights + other.gradients + other.optimizer
        shown.add_row(role, *(f"{cell / unit:,.2f}" for cell in (*cells, total, of_four)))
    shown.add_section()
    for phase, needed in found.phases.items():
        shown.add_row(phase, "", "", "", f"{needed / unit:,.2f}", f"{four.phases[phase] / unit:,.2f}")
    shown.add_section()
    shown.add_row("peak", "", "", "", f"{found.peak / unit:,.2f}", f"{four.peak / unit:,.2f}")
    return shown
