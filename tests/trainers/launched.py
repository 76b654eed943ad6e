"""
A long training with checkpoints, launched as a script to be interrupted. Not a test module.

    python launched.py FOLDER
"""

import os
import signal
import sys
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset

from rlhf_bayes import PPOConfig, PPOTrainer
from rlhf_bayes.testing import EnumerableLM, toy_reward

torch.set_num_threads(1)
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True}
TOY = EnumerableLM(vocab_size=4, max_completion_length=3)


def main(folder: Path) -> None:
    def slow_reward(prompts, completions, completion_ids, **kwargs):
        time.sleep(0.3)
        return toy_reward(prompts, completions, completion_ids)

    args = PPOConfig(
        output_dir=str(folder), max_completion_length=3, num_generations=4, per_device_train_batch_size=12,
        max_steps=2000, learning_rate=1e-3, beta=0.5, save_strategy="steps", save_steps=1, save_total_limit=3, **QUIET,
    )  # fmt: skip
    trainer = PPOTrainer(
        TOY.random_policy(noise=0.0),
        slow_reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": TOY.prompts * 4}),
        processing_class=TOY.tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    # a shell that runs the tests in the background has children ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(Path(sys.argv[1]))
