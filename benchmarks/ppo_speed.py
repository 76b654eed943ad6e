"""
Episodes per second and peak memory of PPOTrainer and GDCTrainer, beside TRL's RLOOTrainer and the PPO of trl 1.12.

    python benchmarks/ppo_speed.py                 about 20 minutes; builds an environment with trl 1.12 the first time
    python benchmarks/ppo_speed.py --quick         one short repetition
    python benchmarks/ppo_speed.py --clock cpu     where other programs share the machine

Every row runs in a process of its own with one thread (`speed_worker.py`), and repetitions are interleaved: a table
entry is the median over repetitions, a ratio the median of the ratios within each. The model is a random Llama of 4
layers × 128 with 512 tokens. Prompts and completions have 32 tokens, none ends early, the batch is 32, and the reward
costs nothing, so that all rows do equal work.

- Phases. Generation: everything in `_generate`, tokenising and decoding included. Scoring: log-probs under policy and
  prior, values, rewards, advantages; our forward of the policy is that of the first step too. Training: loss,
  backward, optimizer, and the other forwards. Rest: the trainer's loop, clipping of gradients, `gc`.
- Floor: bare `generate`, one forward of the prior, and one training forward and backward per epoch of the same model.
- Memory: peak resident set (`ru_maxrss`) minus the resident set after the imports and a miniature run, so models,
  optimizer states and activations.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OLD_ENVIRONMENT = HERE / ".venv-trl-1.12"
PHASES = ("generation", "scoring", "training", "rest")

FLOOR, RLOO, PPO, SEPARATE, OLD, GDC = range(6)
METHODS = {
    FLOOR: ("floor", {"method": "floor"}),
    RLOO: ("RLOO", {"method": "rloo"}),
    PPO: ("PPO", {"method": "ppo"}),
    SEPARATE: ("PPO, separate critic", {"method": "ppo", "critic": "separate"}),
    GDC: ("GDC, forward KL", {"method": "gdc"}),
    OLD: ("PPO of trl 1.12", {"method": "ppo_1_12"}),
}
NAMES = [name for name, _ in METHODS.values()]
SETTINGS = {
    "full, 1 epoch": {},
    "LoRA, 1 epoch": {"lora": True},
    "full, 4 epochs": {"epochs": 4},
    "LoRA, 4 epochs": {"lora": True, "epochs": 4},
}
AIMS = (
    ("PPO: at least 0.9 × the speed of RLOO", PPO, RLOO, "total", 0.9),
    ("PPO: at least 1.5 × the speed of trl 1.12", PPO, OLD, "total", 1.5),
    ("PPO, separate critic, beside trl 1.12, whose critic is always separate", SEPARATE, OLD, "total", None),
    # 1 / 1.1 and 1 / 1.15
    ("PPO: at least 0.91 × the speed of the floor", PPO, FLOOR, "total", 0.91),
    ("GDC: at least 0.87 × the speed of the floor", GDC, FLOOR, "total", 0.87),
    ("PPO: at least 2 × less memory than trl 1.12 (an aim with LoRA)", PPO, OLD, "memory", 2.0),
)
Results = dict[tuple[str, int], list[dict[str, float]]]


def old_python() -> Path:
    """The interpreter of an environment with trl 1.12 and otherwise the versions of this one; built when missing."""
    python = OLD_ENVIRONMENT / "bin" / "python"
    stamp = OLD_ENVIRONMENT / ".installed"
    if stamp.exists():
        return python
    Console().print(f"Building {OLD_ENVIRONMENT} with trl 1.12: some minutes the first time.")
    venv.create(OLD_ENVIRONMENT, with_pip=True, clear=True)
    same = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "transformers", "accelerate", "peft")]
    install = [str(python), "-m", "pip", "install", "--quiet", *same, "trl==1.12.0"]
    # a build such as 2.13.0+cpu is on PyTorch's index, and perhaps on the indexes that pip is configured with
    build = importlib.metadata.version("torch").partition("+")[2]
    index = ["--extra-index-url", f"https://download.pytorch.org/whl/{build}"] if build else []
    if subprocess.run(install, stderr=subprocess.DEVNULL).returncode != 0:
        subprocess.run(install + index, check=True)
    stamp.touch()
    return python


def measure(row: dict, args: argparse.Namespace, old: Path | None) -> dict[str, float]:
    """One row in a process of its own: milliseconds per episode by phase and in total, and MiB."""
    python = old if row["method"] == "ppo_1_12" else sys.executable
    command = [str(python), str(HERE / "speed_worker.py"), "--row", json.dumps(row), "--shape", json.dumps(args.shape)]
    process = subprocess.run(
        [*command, "--rollouts", str(args.rollouts)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if process.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{process.stderr[-4000:]}")
    result = json.loads(process.stdout.splitlines()[-1])
    return result[args.clock] | {"memory": result["memory_mib"]}


def ratio(results: Results, setting: str, slower: int, faster: int, column: str) -> float:
    """Median over repetitions of the ratio of what `slower` needs to what `faster` needs."""
    pairs = zip(results[setting, slower], results[setting, faster], strict=True)
    return statistics.median(a[column] / b[column] for a, b in pairs)


def results_table(results: Results, args: argparse.Namespace) -> Table:
    table = Table(title=f"Milliseconds an episode ({args.clock} clock), medians of {args.repetitions} repetitions")
    for name in ("", "method", "episodes/s", "total", *PHASES, "× floor", "speed of RLOO", "memory, MiB"):
        table.add_column(name, justify="left" if name in ("", "method") else "right")
    for setting in SETTINGS:
        for method, (name, _) in METHODS.items():
            runs = results.get((setting, method))
            if runs is None:
                continue
            median = {column: statistics.median(run[column] for run in runs) for column in runs[0]}
            table.add_row(
                setting if method == FLOOR else "",
                name,
                f"{1000 / median['total']:.1f}",
                *(f"{median[column]:.2f}" for column in ("total", *PHASES)),
                f"{ratio(results, setting, method, FLOOR, 'total'):.2f}",
                f"{ratio(results, setting, RLOO, method, 'total'):.2f} ×",
                f"{median['memory']:.0f}",
            )
        table.add_section()
    return table


def aims_table(results: Results) -> Table:
    table = Table(title="Aims")
    for name in ("aim", *SETTINGS):
        table.add_column(name, justify="left" if name == "aim" else "right")
    for text, ours, theirs, column, wanted in AIMS:
        cells = []
        for setting in SETTINGS:
            if {(setting, theirs), (setting, ours)} <= results.keys():
                value = ratio(results, setting, theirs, ours, column)
                colour = "default" if wanted is None else "green" if value >= wanted else "red"
                cells.append(f"[{colour}]{value:.2f} ×[/]")
            else:
                cells.append("")
        if any(cells):
            table.add_row(text, *cells)
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repetition of 3 rollouts, 1 epoch only")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=8, help="measured rollouts of one repetition of one row")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--no-old", action="store_true", help="leave out trl 1.12, and build no environment")
    parser.add_argument(
        "--setting", dest="settings", action="append", choices=list(SETTINGS), help="repeat for several"
    )
    parser.add_argument("--method", dest="methods", action="append", choices=NAMES, help="beside the floor and RLOO")
    parser.add_argument("--shape", type=json.loads, default={}, help='JSON, e.g. {"vocabulary": 32000, "batch": 16}')
    parser.add_argument("--json", type=Path, help="also write every repetition to this file")
    args = parser.parse_args()
    if args.quick:
        args.repetitions, args.rollouts = 1, 3
    args.settings = args.settings or [name for name, row in SETTINGS.items() if not (args.quick and "epochs" in row)]
    asked = set(args.methods or NAMES) | {METHODS[FLOOR][0], METHODS[RLOO][0]}  # every ratio is by one of these two
    args.methods = [
        method for method in METHODS if METHODS[method][0] in asked and not (args.no_old and method == OLD)
    ]
    return args


def main() -> None:
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    old = old_python() if OLD in args.methods else None
    cells = [(setting, method) for setting in args.settings for method in args.methods]
    results: Results = {}
    for repetition in range(args.repetitions):
        for number, (setting, method) in enumerate(cells, start=1):
            name, row = METHODS[method]
            result = measure(row | SETTINGS[setting], args, old)
            results.setdefault((setting, method), []).append(result)
            done = f"repetition {repetition + 1}/{args.repetitions}, row {number}/{len(cells)}"
            console.print(f"{done}: {setting}, {name}: {result['total']:.1f} ms, {result['memory']:.0f} MiB")
    console.print(results_table(results, args))
    console.print(aims_table(results))
    if args.json is not None:
        named = {f"{setting}; {METHODS[method][0]}": runs for (setting, method), runs in results.items()}
        args.json.write_text(json.dumps(named, indent=2) + "\n")


if __name__ == "__main__":
    main()
