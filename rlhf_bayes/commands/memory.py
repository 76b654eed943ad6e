"""`rlhf-bayes memory`: predicts the memory of PPO by role, and compares it with four full models."""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from rlhf_bayes.commands.footprint import FOUR_MODELS, Footprint, Roles, Run, footprint
from rlhf_bayes.toy import model_path

GIB, MIB = 2**30, 2**20
_COUNTS = (
    "lora_r", "num_members", "per_device_train_batch_size", "max_prompt_length", "max_completion_length",
    "num_processes",
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print the table for parsed arguments."""
    for name in _COUNTS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")
    targets = args.lora_target_modules
    roles = Roles(
        lora_r=args.lora_r,
        lora_target_modules="all-linear" if targets == ["all-linear"] else targets,
        critic=args.critic,
        reward=args.reward or ("model" if args.lora_r is None else "adapter"),
        reward_members=args.num_members,
    )
    training = Run(
        args.per_device_train_batch_size, args.max_prompt_length, args.max_completion_length,
        getattr(torch, args.dtype), args.gradient_checkpointing, args.zero_stage, args.num_processes,
    )  # fmt: skip
    path = args.model_name_or_path or model_path()
    config = AutoConfig.from_pretrained(path)
    found, four = footprint(config, roles, training), footprint(config, FOUR_MODELS, training)
    console = Console()
    console.print(table(found, four, f"{path}: memory of a process"))
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
