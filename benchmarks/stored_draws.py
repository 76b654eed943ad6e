"""
What a step costs that learns from stored completions, beside on-line training and DPO.

    python benchmarks/stored_draws.py

Trains a random Llama for a few steps, each way in a process of its own: peak memory, and CPU seconds of a step, which
other programs on the machine disturb less than the wall clock. All ways learn from the same number of completions in a
step; DPO from half as many pairs. How far such a training gets: `stored_distances.py`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from rlhf_bayes import GDCConfig, GDCTrainer, LanguageModel, toy
from rlhf_bayes.store import CompletionStore, provenance_of, scored_completions

BATCH, GROUP, TOKENS, PROMPTS = 32, 8, 32, 6
WAYS = {
    "gdc, on-line": "draws, scores and learns: policy and prior in memory",
    "gdc, from a store": "the policy alone",
    "dpo": "TRL's DPOTrainer: policy and reference, chosen and rejected completions",
}
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_strategy": "no",
}


class StepTimes(TrainerCallback):
    """CPU seconds of each optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self._start)


def random_llama(hidden: int, layers: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A model as heavy as asked for, over the vocabulary of the bundled one, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(toy.model_path())
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, **sizes, **heads, **tokens)
    return LlamaForCausalLM(config), tokenizer


def even(completion_ids: list, **kwargs: Any) -> list[float]:
    """Share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def fill_store(folder: str, hidden: int, layers: int) -> None:
    """Draw as many completions as the other ways learn from."""
    model, tokenizer = random_llama(hidden, layers)
    for part in (model, tokenizer):
        part.save_pretrained(f"{folder}/model")
    prior = LanguageModel(model, tokenizer, TOKENS)
    likelihood = prior.tilt(even, beta=1.0).likelihood
    store = CompletionStore.create(f"{folder}/store", provenance_of(prior, likelihood))
    for _ in range(2):
        drawn = prior.sample(toy.prompts()[:PROMPTS], BATCH // 2)
        store.append(scored_completions(drawn, prior, likelihood))


def cost_of(way: str, folder: str, steps: int) -> dict[str, float]:
    """Peak memory in MB and median CPU seconds of a step, of this process."""
    times, store = StepTimes(), CompletionStore(f"{folder}/store")
    model = f"{folder}/model"  # TRL reads the reference from there
    common: dict[str, Any] = {
        "output_dir": f"{folder}/out",
        "model_init_kwargs": {"dtype": "float32"},
        "max_steps": steps,
        "learning_rate": 1e-5,
        **QUIET,
    }
    if way == "dpo":
        rows = store.read()
        pairs = {
            "prompt": rows["prompt"][::2],
            "chosen": [text or "a" for text in rows["completion"][::2]],
            "rejected": [text or "b" for text in rows["completion"][1::2]],
        }
        # random tokens are not the tokens of their text: the lengths that the others have
        longest = max(map(len, rows["prompt_ids"])) + TOKENS
        args = DPOConfig(per_device_train_batch_size=BATCH // 2, max_length=longest, **common)
        trainer: Any = DPOTrainer(model, args=args, train_dataset=Dataset.from_dict(pairs), callbacks=[times])
    else:
        sizes = {"per_device_train_batch_size": BATCH, "num_generations": GROUP, "max_completion_length": TOKENS}
        args = GDCConfig(beta=1.0, divergence="log_variance", **sizes, **common)
        data = store if "store" in way else Dataset.from_dict({"prompt": toy.prompts()[:PROMPTS]})
        reward = None if "store" in way else even
        trainer = GDCTrainer(model, reward, args, data, callbacks=[times])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mb": peak, "seconds": median(times.seconds[1:]), "model_mb": 4e-6 * trainer.model.num_parameters()}


def cost(hidden: int, layers: int, steps: int) -> Table:
    """A row for each way, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--hidden", str(hidden), "--layers", str(layers), "--steps", str(steps), "--folder", folder]
        run = [sys.executable, __file__, *sizes, "--way"]
        subprocess.run([*run, "fill"], check=True, stdout=subprocess.DEVNULL)
        found = {
            way: json.loads(subprocess.run([*run, way], check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            for way in WAYS
        }
    size = next(iter(found.values()))["model_mb"]
    table = Table(title=f"{BATCH} completions of up to {TOKENS} tokens a step; the weights have {size:.0f} MB")
    for column in ("", "peak MB", "CPU s a step", "what it does"):
        table.add_column(column)
    for way, row in found.items():
        table.add_row(way, f"{row['peak_mb']:.0f}", f"{row['seconds']:.2f}", WAYS[way])
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a step costs that learns from stored completions.")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--way", choices=["fill", *WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.way == "fill":
        fill_store(flags.folder, flags.hidden, flags.layers)
    elif flags.way is not None:
        print(json.dumps(cost_of(flags.way, flags.folder, flags.steps)))
    else:
        Console().print(cost(flags.hidden, flags.layers, flags.steps))
