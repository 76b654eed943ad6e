"""Trainers of this package and of TRL with equal settings and an equal number of completions, for benchmarks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer

TRAINERS = {
    "ppo": (PPOTrainer, PPOConfig),
    "gdc": (GDCTrainer, GDCConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
}
BATCH = 64  # completions a rollout
# PPO's loss is a mean over tokens and RLOO's over completions, so PPO's gradients are smaller by the mean length. The
# default of 1 would clip all gradients of RLOO and few of PPO. Since clipping helps, all of both are clipped.
MAX_GRAD_NORM = 0.1
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# by default one update on a rollout; `steps_per_generation` splits it, and `num_iterations` repeats the updates
ONE_UPDATE = {"steps_per_generation": 1, "num_iterations": 1, "max_grad_norm": MAX_GRAD_NORM}


def steps_per_rollout(options: dict[str, Any]) -> int:
    """Number of optimizer steps on the completions of a rollout."""
    options = ONE_UPDATE | options
    return options["steps_per_generation"] * options["num_iterations"]


def make_trainer(
    name: str,
    options: dict[str, Any],
    *,
    model: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    reward_func: Callable[..., list[float]],
    prompts: Sequence[str],
    beta: float,
    max_completion_length: int,
    learning_rate: float,
    seed: int,
    samples: int,
    output_dir: str | Path,
    lora: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    log_every_rollout: bool = False,
) -> Trainer:
    """
    A trainer of `TRAINERS` on the CPU, which draws so many completions in batches of 64 and says nothing.

    Adam with linear decay to 0, in fp32. `options` are fields of its config. The model is a folder, because RLOO loads
    its reference from it. With `lora` an adapter of rank 16 on every matrix is trained instead of all weights.
    """
    trainer_class, config_class = TRAINERS[name]
    overrides = ONE_UPDATE | options
    trainer = trainer_class(
        model=str(model),
        reward_funcs=reward_func,
        args=config_class(
            output_dir=str(output_dir),
            seed=seed,
            beta=beta,
            learning_rate=learning_rate,
            per_device_train_batch_size=BATCH // overrides["steps_per_generation"],
            max_completion_length=max_completion_length,
            max_steps=samples // BATCH * steps_per_rollout(options),
            model_init_kwargs={"dtype": "float32"},
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="steps" if log_every_rollout else "no",
            logging_steps=steps_per_rollout(options),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **overrides,
        ),
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
