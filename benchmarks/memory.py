"""
Peak memory of PPO by the layout of its roles, compared with LoRA fine-tuning and with `rlhf-bayes memory`.

    python benchmarks/memory.py                 about 15 minutes: the layouts, then how memory grows
    python benchmarks/memory.py --quick         the layouts on a small shape

Every row runs in a process of its own with one thread. The model is a random Llama in fp32; all completions have the
same length, and each batch is one micro-batch.

- Memory: peak resident set minus the resident set after the imports and a miniature run. malloc is told to return
  freed blocks, so that only memory in use is counted. On a GPU: the peak that torch allocated.
- Weights are counted, not measured: weights that are read from a file become resident only when they are used.
- Growth: memory beyond the weights, along one axis at a time; the slope is that of the logarithms.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from speed_worker import Shape, build_model, build_prompts, build_tokenizer, resident_mib
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from trl import SFTConfig, SFTTrainer

from rlhf_bayes import PPOConfig, PPOTrainer
from rlhf_bayes.commands.footprint import Footprint, Roles, Run, footprint
from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.rewards import RewardModel

SFT, FULL, SEPARATE, SHARED, ADAPTER, FUNCTION = range(6)
LAYOUTS = {
    SFT: ("LoRA supervised fine-tuning", {"method": "sft"}),
    FULL: ("four full models", {"lora": False, "critic": "separate", "reward": "model"}),
    SEPARATE: ("LoRA, separate critic, a reward model", {"critic": "separate", "reward": "model"}),
    SHARED: ("LoRA, shared critic, a reward model", {"reward": "model"}),
    ADAPTER: ("LoRA, shared critic, reward as adapter", {"reward": "adapter"}),
    FUNCTION: ("LoRA, shared critic, a reward function", {"reward": "function"}),
}
AIMS = (
    ("reward as adapter / LoRA supervised fine-tuning", ADAPTER, SFT, 1.15),
    ("reward function / LoRA supervised fine-tuning", FUNCTION, SFT, 1.15),
    ("reward as adapter / four full models", ADAPTER, FULL, 0.4),
)
BASE = Shape(layers=8, hidden=512, vocabulary=8192, prompt=64, completion=64, batch=16)
SMALL = Shape(layers=2, hidden=64, vocabulary=512, prompt=16, completion=16, batch=4)
GROWTH = {
    "batch": (8, 16, 32),
    "completion": (64, 128, 256),
    "vocabulary": (8192, 32768, 131072),
}
GROWING = replace(BASE, layers=4, hidden=128, batch=8)
WORDS = 1  # the tokenizer has one word only: words would take memory that is not the model's
LORA_RANK, STEPS = 16, 2  # the first step creates the optimizer's state, so the second needs the most memory
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "bf16": False, "max_steps": STEPS}


def lora_config(task_type: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(r=LORA_RANK, lora_alpha=32, task_type=task_type, target_modules="all-linear")


def reward_of(row: dict, base: str, folder: Path, shape: Shape):
    """A reward function, or the folder of a reward model whose tokens, padding too, are in the vocabulary."""
    if row["reward"] == "function":
        return lambda completion_ids, **columns: [float(len(set(ids))) for ids in completion_ids]
    if row["reward"] == "model":
        model = build_model(shape, LlamaForSequenceClassification)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        model = get_peft_model(model, lora_config("SEQ_CLS"))
    tokenizer = build_tokenizer(shape, WORDS)
    tokenizer.pad_token = tokenizer.eos_token = "w0"
    RewardModel(model, tokenizer).save_pretrained(folder / "reward")
    return str(folder / "reward")


def sft_trainer(row: dict, shape: Shape, folder: Path, base: str) -> SFTTrainer:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.vocabulary, (64, shape.prompt + shape.completion), generator=generator)
    args = SFTConfig(
        str(folder / "out"), per_device_train_batch_size=shape.batch, gradient_checkpointing=row["checkpointing"],
        max_length=None, model_init_kwargs={"dtype": "float32"}, use_cpu=not torch.cuda.is_available(), **QUIET,
    )  # fmt: skip
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    return SFTTrainer(
        base, args, train_dataset=dataset, processing_class=build_tokenizer(shape, WORDS), peft_config=lora_config()
    )


def ppo_trainer(row: dict, shape: Shape, folder: Path, base: str) -> PPOTrainer:
    args = PPOConfig(
        str(folder / "out"), per_device_train_batch_size=shape.batch, gradient_checkpointing=row["checkpointing"],
        num_generations=4, max_completion_length=shape.completion, critic=row.get("critic", "shared"),
        model_init_kwargs={"dtype": "float32"}, use_cpu=not torch.cuda.is_available(), **QUIET,
    )  # fmt: skip
    return PPOTrainer(
        base,
        reward_of(row, base, folder, shape),
        args,
        train_dataset=Dataset.from_dict({"prompt": build_prompts(shape)}),
        processing_class=build_tokenizer(shape, WORDS),
        peft_config=lora_config() if row.get("lora", True) else None,
    )


def train(row: dict, shape: Shape) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = f"{folder}/base"
        build_model(shape).save_pretrained(base)
        make = sft_trainer if row.get("method") == "sft" else ppo_trainer
        make(row, shape, Path(folder), base).train()


def work(row: dict, shape: Shape) -> float:
    """Peak MiB of a row in this process."""
    quiet(threads=1)
    # a miniature first, so that the pages of the libraries are resident before this run's memory is measured
    train(row, Shape(layers=1, hidden=8, vocabulary=16, prompt=2, completion=2, batch=4))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        train(row, shape)
        return torch.cuda.max_memory_allocated() / 2**20
    before = resident_mib()
    train(row, shape)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def measure(row: dict, shape: Shape) -> float:
    """Peak MiB of a row in a process of its own."""
    # blocks above the threshold are mapped by malloc, which unmaps them when they are freed
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--row", json.dumps(row), "--shape", json.dumps(asdict(shape))]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    if process.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{process.stderr[-4000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def predicted(row: dict, shape: Shape) -> Footprint:
    """What `rlhf-bayes memory` predicts for a row; for supervised fine-tuning only the weights are used."""
    critic, reward = row.get("critic", "shared"), row.get("reward", "function")
    roles = Roles(LORA_RANK if row.get("lora", True) else None, "all-linear", critic, reward)
    lengths = (shape.batch, shape.prompt, shape.completion)
    with torch.device("meta"):
        config = build_model(shape).config
    return footprint(config, roles, Run(*lengths, gradient_checkpointing=row["checkpointing"]))


def layouts(args: argparse.Namespace, shape: Shape, console: Console) -> None:
    """Measure each layout, and print the table and the aims."""
    peaks, expected = {}, {}
    for layout, (name, row) in LAYOUTS.items():
        row = row | {"checkpointing": args.gradient_checkpointing}
        peaks[layout], expected[layout] = measure(row, shape), predicted(row, shape)
        console.print(f"{name}: {peaks[layout]:.0f} MiB")
    console.print(layouts_table(peaks, expected, shape))
    for text, ours, theirs, wanted in AIMS:
        value = peaks[ours] / peaks[theirs]
        console.print(f"{text}: [{'green' if value <= wanted else 'red'}]{value:.2f} ×[/], the aim at most {wanted}")


def layouts_table(peaks: dict[int, float], expected: dict[int, Footprint], shape: Shape) -> Table:
    title = f"{shape.layers} layers × {shape.hidden}, {shape.vocabulary} tokens, batch {shape.batch}"
    shown = Table(title=f"Peak memory, MiB: {title} of {shape.prompt} + {shape.completion}")
    for name in ("", "weights", "predicted", "measured", "× fine-tuning", "× four models"):
        shown.add_column(name, justify="right" if name else "left")
    for layout, peak in peaks.items():
        found = expected[layout]
        guess = "" if layout == SFT else f"{found.peak / 2**20:.0f}"
        ratios = [f"{peak / peaks[other]:.2f}" for other in (SFT, FULL)]
        shown.add_row(LAYOUTS[layout][0], f"{found.weights / 2**20:.0f}", guess, f"{peak:.0f}", *ratios)
    return shown


def slope(xs: list[float], ys: list[float]) -> float:
    """The slope of log y on log x between the last two points, where constant terms matter least."""
    return float(np.diff(np.log(ys[-2:]))[0] / np.diff(np.log(xs[-2:]))[0])


def growth(args: argparse.Namespace, console: Console) -> dict[str, dict[str, list[float]]]:
    """MiB on top of the weights along each axis, of PPO and of fine-tuning, measured and predicted."""
    found: dict[str, dict[str, list[float]]] = {}
    for axis, values in GROWTH.items():
        for layout in (ADAPTER, SFT):
            name, row = LAYOUTS[layout][0], LAYOUTS[layout][1] | {"checkpointing": args.gradient_checkpointing}
            for value in values:
                shape = replace(GROWING, **{axis: value})
                said = predicted(row, shape)
                above = measure(row, shape) - said.weights / 2**20
                found.setdefault(axis, {}).setdefault(name, []).append(above)
                console.print(f"{axis} {value}, {name}: {above:.0f} MiB above the weights")
                if layout != SFT:
                    found[axis].setdefault("predicted", []).append((said.peak - said.weights) / 2**20)
    return found


def growth_table(found: dict[str, dict[str, list[float]]]) -> Table:
    shown = Table(title="MiB above the weights, and the slope of the logarithms between the last two")
    for name in ("", "", "", "slope"):
        shown.add_column(name, justify="right" if name else "left")
    for axis, lines in found.items():
        for name, mib in lines.items():
            points = ", ".join(f"{value}: {y:.0f}" for value, y in zip(GROWTH[axis], mib, strict=True))
            shown.add_row(axis, name, points, f"{slope(list(GROWTH[axis]), mib):.2f}")
        shown.add_section()
    return shown


def plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.5), sharey=True, layout="constrained")
    for panel, (axis, lines) in zip(np.atleast_1d(axes), found.items(), strict=True):
        for name, mib in lines.items():
            panel.loglog(GROWTH[axis], mib, "--" if name == "predicted" else "o-", label=name)
        panel.set_xlabel(axis)
    np.atleast_1d(axes)[0].set_ylabel("MiB above the weights")
    np.atleast_1d(axes)[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the layouts, on a small shape")
    parser.add_argument("--only", choices=("layouts", "growth"), help="default: both")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--plot", type=Path, default=Path("runs/memory.png"))
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, default={}, help='JSON, e.g. {"vocabulary": 32000, "batch": 32}')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.row is not None:
        print(json.dumps(work(args.row, Shape(**args.shape))))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    shape = replace(SMALL if args.quick else BASE, **args.shape)
    if args.only != "growth":
        layouts(args, shape, console)
    if not (args.quick or args.only == "layouts"):
        found = growth(args, console)
        console.print(growth_table(found))
        plot(found, args.plot)
        console.print(f"Plot in {args.plot}.")


if __name__ == "__main__":
    main()
