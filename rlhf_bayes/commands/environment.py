"""`rlhf-bayes env`: versions and devices, for a report of a bug."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = (
    "rlhf_bayes", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "vllm", "arviz",
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print a line for each fact."""
    for name, value in facts().items():
        print(f"{name:<14} {value}")


def facts() -> dict[str, str]:
    """Name -> version or device."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    count = torch.cuda.device_count()
    found["GPUs"] = ", ".join(torch.cuda.get_device_name(index) for index in range(count)) or "none"
    found["threads"] = str(torch.get_num_threads())
    return found
