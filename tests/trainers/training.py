"""Short trainings on the enumerable toy: configurations, trainers that record, rewards. Not a test module."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_bayes import PPOConfig, PPOTrainer
from rlhf_bayes.testing import EnumerableLM, toy_reward

QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def config(folder: str | Path, **changes: Any) -> PPOConfig:
    """A quiet configuration for the CPU: 24 completions of 3 prompts a step, plain SGD so that noise stays small."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        **QUIET,
        "max_completion_length": 3,
        "num_generations": 8,
        "per_device_train_batch_size": 24,
        "per_device_eval_batch_size": 24,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "beta": 0.5,
        "logging_steps": 1,
    }
    return PPOConfig(**defaults | changes)


def prompts_of(toy: EnumerableLM, repeats: int = 1) -> Dataset:
    return Dataset.from_dict({"prompt": toy.prompts * repeats})


class Recorder(TrainerCallback):
    """Gradients of every optimizer step, by parameter name."""

    def __init__(self):
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class RecordingTrainer(PPOTrainer):
    """Keeps its rollouts and the batches made of them."""

    rollouts: list
    batches: list
    modes: list[str]

    def rollout_batch(self, rollout):
        batch = super().rollout_batch(rollout)
        self.__dict__.setdefault("rollouts", []).append(rollout)
        self.__dict__.setdefault("modes", []).append(self.mode)
        self.__dict__.setdefault("batches", []).append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


def trainer(
    toy: EnumerableLM,
    args: PPOConfig,
    model: nn.Module | str | None = None,
    reward_funcs: Any = toy_reward,
    **arguments: Any,
) -> RecordingTrainer:
    """A trainer on the toy's prompts; by default from a copy of the prior."""
    defaults: dict[str, Any] = {"train_dataset": prompts_of(toy), "processing_class": toy.tokenizer}
    model = toy.random_policy(noise=0.0) if model is None else model
    return RecordingTrainer(model, reward_funcs, args, **defaults | arguments)


def table_reward(toy: EnumerableLM, table: Tensor):
    """A reward function that looks completions up in `table` (P, N), in the order of the toy."""
    column = {tuple(ids): index for index, ids in enumerate(toy.completion_ids)}

    def reward(prompts, completion_ids, **kwargs):
        return [
            table[toy.prompts.index(prompt), column[tuple(ids)]].item()
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    return reward


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor], critic: bool = False) -> float:
    """Largest change of the policy's weights, or of the critic's."""
    return max(
        (after[name] - before[name]).abs().max().item() for name in before if (".critic." in f".{name}") == critic
    )


def logged(trainer: PPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
