"""
Tokens per second of generation and training on a GPU, beside what its memory and arithmetic allow; and peak memory.

    python benchmarks/gpu_speed.py                             the shape of Qwen2-0.5B, random weights, bf16
    python benchmarks/gpu_speed.py --size '{"layers": 8}'      a smaller one
    python benchmarks/gpu_speed.py --device cpu --quick        a miniature, which shows that it runs and nothing else

**Not run on a GPU yet.** Every row runs in a process of its own (`gpu_speed_worker.py`); repetitions are interleaved,
an entry is the median over repetitions, a ratio the median of the ratios within each. The model is built from its
config: nothing is downloaded. Prompts and completions have the same length in every row, and the reward costs nothing.

- Limits: bytes a second of a large copy and operations a second of a large product in bf16, measured by the same
  process just before. Decoding must read the weights and the cache once a step; training must run a forward of policy
  and of prior and a backward pass. A share of 1 would be a device that does nothing else and never waits.
- Generation: everything in `_generate`, tokenising and decoding included; with vLLM, sending the weights too.
  Training: scoring, loss, backward and optimizer, per token of prompt and completion. Between phases the process waits
  for the device.
- Peers: TRL's RLOO with the same settings; and for vLLM in the trainer's process (`colocate`), `generate`.
- Memory: the peak that torch allocated in two steps, beside `rlhf-bayes memory`'s prediction, which knows no autocast.
- Noise: log-probs in bf16 against fp32, as root mean squares of tokens and of completions, nats.

Without bitsandbytes or vLLM their rows are left out, with the reason; so is all of it where there is no GPU.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

WORKER = Path(__file__).with_name("gpu_speed_worker.py")
ROWS: dict[str, dict[str, Any]] = {
    "RLOO": {"method": "rloo"},
    "PPO": {"method": "ppo"},
    "GDC": {"method": "gdc"},
    "RLOO, LoRA": {"method": "rloo", "lora": True},
    "PPO, LoRA": {"method": "ppo", "lora": True},
    "GDC, LoRA": {"method": "gdc", "lora": True},
    "PPO, QLoRA, 4 bits": {"method": "ppo", "lora": True, "bits": 4},
    "PPO, vLLM": {"method": "ppo", "vllm": True},
    "PPO, LoRA, vLLM": {"method": "ppo", "lora": True, "vllm": True},
}
# (row, peer): a row's tokens a second as a multiple of its peer's
PEERS = (
    ("PPO", "RLOO"),
    ("GDC", "RLOO"),
    ("PPO, LoRA", "RLOO, LoRA"),
    ("GDC, LoRA", "RLOO, LoRA"),
    ("PPO, QLoRA, 4 bits", "PPO, LoRA"),
    ("PPO, vLLM", "PPO"),
    ("PPO, LoRA, vLLM", "PPO, LoRA"),
)
MINIATURE = {
    "layers": 1, "hidden": 16, "intermediate": 32, "heads": 2, "kv_heads": 1, "vocabulary": 32,
    "prompt": 3, "completion": 4, "batch": 4,
}  # fmt: skip
GIB = 2**30
Results = dict[str, list[dict[str, Any]]]


def left_out(row: dict[str, Any], device: str) -> str | None:
    """Why a row cannot be run here; None if it can."""
    if row.get("bits") is not None and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: `pip install bitsandbytes`"
    if row.get("vllm") and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed: `pip install 'rlhf_bayes[vllm]'`"
    if row.get("vllm") and device == "cpu":
        return "vLLM is measured on a GPU only"
    return None


def measure(row: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What the worker prints for a row, in a process of its own, with one GPU: several would share each batch."""
    command = [sys.executable, str(WORKER), "--row", json.dumps(row), "--size", json.dumps(args.size)]
    command += ["--device", args.device, "--rollouts", str(args.rollouts)]
    first = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"), "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | first)
    if process.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{process.stderr[-4000:]}")
    (found,) = (line for line in process.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(found.removeprefix("FOUND "))


def median(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(value, runs))


def speed_table(results: Results, args: argparse.Namespace) -> Table:
    table = Table(title=f"Tokens a second on {args.device}, medians of {args.repetitions} repetitions")
    for name in ("", "generation", "limit", "share", "training", "limit", "share", "peak", "predicted", "measured /"):
        table.add_column(name, justify="right" if name else "left")
    for name, runs in results.items():
        cells = []
        for phase in ("generation", "training"):
            cells += [f"{median(runs, lambda run, key=key: run[key]):,.0f}" for key in (phase, f"{phase}_limit")]
            cells.append(f"{median(runs, lambda run, phase=phase: run[phase] / run[f'{phase}_limit']):.2f}")
        peak, predicted = runs[-1]["peak"], runs[-1]["predicted"]
        cells += ["" if x is None else f"{x / GIB:.3f} GiB" for x in (peak, predicted)]
        table.add_row(name, *cells, f"{peak / predicted:.2f}" if peak and predicted else "")
    return table


def ratio(results: Results, ours: str, theirs: str, phase: str) -> float:
    """Median over repetitions of a row's tokens a second, as a multiple of its peer's."""
    pairs = zip(results[ours], results[theirs], strict=True)
    return statistics.median(a[phase] / b[phase] for a, b in pairs)


def peers_table(results: Results) -> Table:
    table = Table(title="Tokens a second, as multiples of a peer's in the same run")
    for name in ("", "peer", "generation", "training"):
        table.add_column(name, justify="right" if name in ("generation", "training") else "left")
    for ours, theirs in PEERS:
        if ours in results and theirs in results:
            ratios = (ratio(results, ours, theirs, phase) for phase in ("generation", "training"))
            table.add_row(ours, theirs, *(f"{value:.2f} ×" for value in ratios))
    return table


def noise_table(found: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Errors of log-probs against fp32, root mean squares, nats")
    for name in ("", "token", "completion"):
        table.add_column(name, justify="right" if name else "left")
    for name, errors in found.items():
        table.add_row(name, f"{errors['token']:.4f}", f"{errors['completion']:.3f}")
    return table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one repetition of 2 rollouts on a miniature")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="names of rows")
    parser.add_argument("--attention", default="sdpa", help="sdpa, eager, flash_attention_2")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=8, help="measured rollouts of one repetition of one row")
    parser.add_argument("--size", type=json.loads, default={}, help='JSON, e.g. {"layers": 8, "batch": 32}')
    parser.add_argument("--json", type=Path, help="also write every repetition to this file")
    args = parser.parse_args(arguments)
    if args.quick:
        args.repetitions, args.rollouts, args.size = 1, 2, MINIATURE | args.size
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.device == "cuda" and not torch.cuda.is_available():
        console.print("Skipped: torch sees no GPU. `--device cpu --quick` shows on a CPU that it runs.")
        return
    reasons = {name: left_out(ROWS[name], args.device) for name in args.only}
    for name, reason in reasons.items():
        if reason is not None:
            console.print(f"{name}: left out. {reason}", markup=False)
    rows = [name for name in args.only if reasons[name] is None]
    common = {"attention": args.attention, "checkpointing": args.gradient_checkpointing}
    results: Results = {}
    for repetition in range(args.repetitions):
        for name in rows:
            found = measure(ROWS[name] | common, args)
            results.setdefault(name, []).append(found)
            rates = f"{found['generation']:,.0f} and {found['training']:,.0f} tokens a second"
            console.print(f"repetition {repetition + 1}/{args.repetitions}: {name}: {rates}")
    noise = measure({"method": "noise"}, args)
    console.print(speed_table(results, args))
    console.print(peers_table(results))
    console.print(noise_table(noise))
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": results, "noise": noise}, indent=2) + "\n")


if __name__ == "__main__":
    main()
