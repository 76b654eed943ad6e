"""
One row of `reward_speed.py`: trains a small random reward model for a few steps and prints the cost of one, as JSON.

All texts have the same length and are given as token ids, so that all rows do equal work and tokenising costs nothing.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from speed_worker import WARM_UP, Clock, Shape, build_model, build_tokenizer, measured
from transformers import LlamaForSequenceClassification, TrainerCallback


@dataclass(frozen=True)
class Row:
    """The trainer to measure, and its settings."""

    trainer: str  # trl, or ours
    num_members: int = 1
    lora: bool = False


class StepTimer(TrainerCallback):
    """Times the steps; a step lasts until the next one begins."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.start_rollout()

    def on_train_end(self, args, state, control, **kwargs):
        self.clock.start_rollout()


def build_pairs(shape: Shape, steps: int) -> Dataset:
    """Random texts of prompt and completion, `shape.batch` pairs for each step."""
    generator = torch.Generator().manual_seed(1)
    size = (2, steps * shape.batch, shape.prompt + shape.completion)
    chosen, rejected = torch.randint(1, shape.vocabulary, size, generator=generator).tolist()
    return Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected})


def train(row: Row, shape: Shape, steps: int, clock: Clock) -> None:
    if row.trainer == "trl":
        from trl import RewardConfig, RewardTrainer

        options = {}
    else:
        from rlhf_bayes import RewardConfig, RewardTrainer

        options = {"num_members": row.num_members, "ensemble": "lora" if row.lora else "heads"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=build_model(shape, LlamaForSequenceClassification),
            args=RewardConfig(
                output_dir=folder,
                learning_rate=1e-4,
                per_device_train_batch_size=shape.batch,
                max_length=None,
                max_steps=steps + WARM_UP,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                **options,
            ),
            train_dataset=build_pairs(shape, steps + WARM_UP),
            processing_class=build_tokenizer(shape),
            peft_config=LoraConfig(r=16, lora_alpha=32, task_type="SEQ_CLS") if row.lora else None,
            callbacks=[StepTimer(clock)],
        )
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--row", type=json.loads, required=True)
    parser.add_argument("--shape", type=json.loads, default={})
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    row, shape = Row(**args.row), Shape(**args.shape)
    clock, memory = measured(lambda *run: train(row, *run), shape, args.steps)
    totals = {name: column["total"] for name, column in clock.medians(shape.batch).items()}
    print(json.dumps({"row": asdict(row), "memory": memory, **totals}))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
