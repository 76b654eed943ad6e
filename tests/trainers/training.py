"""Short trainings on the enumerable toy: configurations, trainers that record, rewards. Not a test module."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer
from rlhf_bayes.testing import EnumerableLM, toy_reward
from rlhf_bayes.trainers.rollout.scored_rollout import prompt_key

QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def config(folder: str | Path, of: type = PPOConfig, **changes: Any) -> Any:
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
    return of(**defaults | changes)


def gdc_config(folder: str | Path, **changes: Any) -> GDCConfig:
    return config(folder, GDCConfig, **changes)


def prompts_of(toy: EnumerableLM, repeats: int = 1) -> Dataset:
    return Dataset.from_dict({"prompt": toy.prompts * repeats})


class Recorder(TrainerCallback):
    """Gradients of every optimizer step, by parameter name."""

    def __init__(self):
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class Recording:
    """Mixed into a trainer: keeps its rollouts and the batches made of them."""

    rollouts: list
    batches: list
    modes: list[str]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollouts, self.modes, self.batches = [], [], []
        make_batch = self.objective.batch

        def recorded(rollout):
            batch = make_batch(rollout)
            self.rollouts.append(rollout)
            self.modes.append(self.mode)
            columns = batch.columns().items()
            self.batches.append({name: x.clone() if isinstance(x, Tensor) else list(x) for name, x in columns})
            return batch

        self.objective.batch = recorded


class RecordingPPO(Recording, PPOTrainer):
    pass


class RecordingGDC(Recording, GDCTrainer):
    pass


def trainer(
    toy: EnumerableLM,
    args: PPOConfig | GDCConfig,
    model: nn.Module | str | None = None,
    reward_funcs: Any = toy_reward,
    **arguments: Any,
) -> Any:
    """The trainer of a configuration, on the toy's prompts; by default from a copy of the prior."""
    defaults: dict[str, Any] = {"train_dataset": prompts_of(toy), "processing_class": toy.tokenizer}
    model = toy.random_policy(noise=0.0) if model is None else model
    reward_funcs = None if "likelihood" in arguments else reward_funcs
    kind = RecordingGDC if isinstance(args, GDCConfig) else RecordingPPO
    return kind(model, reward_funcs, args, **defaults | arguments)


def table_reward(toy: EnumerableLM, table: Tensor):
    """A reward function that looks completions up in `table` (P, N), in the order of the toy."""
    column = {tuple(ids): index for index, ids in enumerate(toy.completion_ids)}

    def reward(prompts, completion_ids, **kwargs):
        return [
            table[toy.prompts.index(prompt), column[tuple(ids)]].item()
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    return reward


def keep_log_z(trained: GDCTrainer, log_zs: Tensor) -> None:
    """Give the trainer log Z of its prompts (P,), nats, beyond what any draw could change."""
    keys = [str(prompt_key({"prompt": prompt})) for prompt in trained.train_dataset.unique("prompt")]
    entries = {key: [log_z + 60.0, 60.0, 1e20, 10**20, 1.0] for key, log_z in zip(keys, log_zs.tolist(), strict=True)}
    normalizers = trained.objective.target.normalizers
    normalizers.pool.load_state_dict({"log_z_bound": normalizers.bound, "entries": entries})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor], critic: bool = False) -> float:
    """Largest change of the policy's weights, or of the critic's."""
    changes = [
        (after[name] - before[name]).abs().max().item() for name in before if (".critic." in f".{name}") == critic
    ]
    return max(changes, default=0.0)


def logged(trainer: PPOTrainer | GDCTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
