"""
Pairs per second and peak memory of RewardTrainer, alone and as an ensemble, beside TRL's RewardTrainer.

    python benchmarks/reward_speed.py                 about 12 minutes
    python benchmarks/reward_speed.py --quick         one short repetition
    python benchmarks/reward_speed.py --clock cpu     where other programs share the machine

Every row runs in a process of its own with one thread (`reward_speed_worker.py`), and repetitions are interleaved: a
table entry is the median over repetitions, a ratio the median of the ratios within each. The model is a random Llama
of 4 layers × 128 with 512 tokens; pairs of texts of 64 tokens, 32 pairs a step.

- Time: that of a whole step of the trainer; the median over steps.
- Memory: peak resident set (`ru_maxrss`) minus the resident set after the imports and a miniature run, so the model,
  optimizer states and activations. It is measured once, in a process in which glibc returns freed memory at once:
  otherwise glibc may keep as much again, and the amount differs from run to run.
- LoRA members are trained one after the other, so that the activations of only one are held. Their time grows with
  their number, and there is no aim for it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
TRL, OURS, HEADS, TRL_LORA, LORA, LORAS = range(6)
ROWS = {
    TRL: ("TRL", {"trainer": "trl"}),
    OURS: ("K = 1", {"trainer": "ours"}),
    HEADS: ("K = 4 heads", {"trainer": "ours", "num_members": 4}),
    TRL_LORA: ("TRL, LoRA", {"trainer": "trl", "lora": True}),
    LORA: ("K = 1, LoRA", {"trainer": "ours", "lora": True}),
    LORAS: ("K = 4 LoRA", {"trainer": "ours", "num_members": 4, "lora": True}),
}
AIMS = (
    ("K = 1: at most 1.05 × the time of TRL", OURS, TRL, "time", 1.05),
    ("K = 1, LoRA: at most 1.05 × the time of TRL with LoRA", LORA, TRL_LORA, "time", 1.05),
    ("K = 4 heads: at most 1.5 × the time of K = 1", HEADS, OURS, "time", 1.5),
    ("K = 4 heads: at most 1.2 × the memory of K = 1", HEADS, OURS, "memory", 1.2),
    ("K = 4 LoRA: at most 1.2 × the memory of K = 1, LoRA", LORAS, LORA, "memory", 1.2),
    ("K = 4 LoRA, beside K = 1, LoRA", LORAS, LORA, "time", None),
)
# tensors of 64 KiB or more get pages of their own, which glibc returns when they are freed
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
Results = dict[int, list[dict[str, float]]]


def measure(row: dict, shape: dict, steps: int, environment: dict[str, str]) -> dict[str, float]:
    """One row in a process of its own: milliseconds per pair on the clocks "wall" and "cpu", and MiB of "memory"."""
    command = [sys.executable, str(HERE / "reward_speed_worker.py"), "--row", json.dumps(row)]
    process = subprocess.run(
        [*command, "--shape", json.dumps(shape), "--steps", str(steps)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment,
    )
    if process.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{process.stderr[-4000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def ratio(results: Results, ours: int, theirs: int, column: str) -> float:
    """Median over repetitions of the ratio of what `ours` needs to what `theirs` needs."""
    pairs = zip(results[ours], results[theirs], strict=True)
    return statistics.median(a[column] / b[column] for a, b in pairs)


def results_table(results: Results, args: argparse.Namespace) -> Table:
    table = Table(title=f"Training of reward models ({args.clock} clock), medians of {args.repetitions} repetitions")
    table.add_column("trainer")
    for name in ("pairs/s", "ms a pair", "× time of TRL", "memory, MiB", "× memory of TRL"):
        table.add_column(name, justify="right")
    for row, (name, options) in ROWS.items():
        peer = TRL_LORA if options.get("lora") else TRL
        time, memory = (statistics.median(run[column] for run in results[row]) for column in ("time", "memory"))
        table.add_row(
            name,
            f"{1000 / time:.1f}",
            f"{time:.2f}",
            f"{ratio(results, row, peer, 'time'):.2f}",
            f"{memory:.0f}",
            f"{ratio(results, row, peer, 'memory'):.2f}",
            end_section=row == HEADS,
        )
    return table


def aims_table(results: Results) -> Table:
    table = Table("aim", title="Aims")
    table.add_column("ratio", justify="right")
    for text, ours, theirs, column, wanted in AIMS:
        value = ratio(results, ours, theirs, column)
        colour = "default" if wanted is None else "green" if value <= wanted else "red"
        table.add_row(text, f"[{colour}]{value:.3f} ×[/]")
    return table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repetition of 3 steps")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of one repetition of one row")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--shape", type=json.loads, default={}, help='JSON, e.g. {"vocabulary": 32000, "batch": 16}')
    parser.add_argument("--json", type=Path, help="also write every repetition to this file")
    args = parser.parse_args(arguments)
    if args.quick:
        args.repetitions, args.steps = 1, 3
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    results: Results = {}
    memory: dict[int, float] = {}
    for row, (name, options) in ROWS.items():
        memory[row] = measure(options, args.shape, 2, RETURN_MEMORY)["memory"]
        console.print(f"memory, row {row + 1}/{len(ROWS)}: {name}, {memory[row]:.0f} MiB", highlight=False)
    for repetition in range(args.repetitions):
        for row, (name, options) in ROWS.items():
            time = measure(options, args.shape, args.steps, {})[args.clock]
            results.setdefault(row, []).append({"time": time, "memory": memory[row]})
            done = f"repetition {repetition + 1}/{args.repetitions}, row {row + 1}/{len(ROWS)}"
            console.print(f"{done}: {name}, {time:.2f} ms a pair", highlight=False)
    console.print(results_table(results, args))
    console.print(aims_table(results))
    if args.json is not None:
        args.json.write_text(json.dumps({ROWS[row][0]: runs for row, runs in results.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
