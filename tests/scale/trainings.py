"""
Short trainings that say the same on any number of processes, whatever shards them. Not a test module.

Nothing is drawn: completions are a function of the prompt, its sibling and the step, so that all rollouts are equal.
Adam with a large ε is gradient descent with a memory: a gradient that is too long shows, and so does a lost state.
"""

import json
import math
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer
from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.testing import EnumerableLM, toy_reward

TOY = EnumerableLM(vocab_size=4, max_completion_length=3)
TRAININGS = ("ppo", "ppo-lora", "gdc", "gdc-lora", "reward", "reward-lora")
LAST_STEP = 4
PROMPTS = ["a", "b a", "b a b a", "b", "a a", "b b a", "a b", "a a a a b", "b b", "a b a", "a a b", "b a a b"]
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "max_steps": LAST_STEP,
    "save_steps": 1,
    "logging_steps": 1,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "optim": "adamw_torch",
    "adam_epsilon": 1.0,
    "seed": 3,
}
ROLLOUTS: dict[str, Any] = {
    "max_completion_length": 3,
    # six completions to a micro-batch: siblings are parted by micro-batches and by processes
    "num_generations": 4,
    # a rollout lasts two steps, so that a run is resumed in the middle of one
    "num_iterations": 2,
    "learning_rate": 0.1,
    "beta": 0.5,
}


def save_models(folder: Path) -> None:
    """What the trainings start from: all processes read it, and none of them may write it."""
    TOY.save(folder / "prior")
    TOY.random_policy(noise=0.05).save_pretrained(folder / "policy")
    TOY.tokenizer.save_pretrained(folder / "policy")


def trainer_of(training: str, models: Path, folder: Path, num_processes: int, **changes: Any) -> Trainer:
    """One of `TRAININGS`, with the same global batch on any number of processes; `changes` to its configuration."""
    kind, lora = training.removesuffix("-lora"), training.endswith("-lora")
    torch.manual_seed(5)  # of the adapters, which start before the trainer is seeded
    make = {"ppo": _ppo, "gdc": _gdc, "reward": _reward}[kind]
    return make(models, folder, num_processes, lora, changes)


class Tabled:
    """Draws nothing: the completion is a function of the prompt, of the sibling and of the step."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        completions, step, seen = TOY.completion_ids, self.state.global_step, Counter()
        # siblings may lie in two processes: what all of them ask for, in order
        asked = _everyones(self, [tuple(ids) for ids in prompt_ids])
        drawn = []
        for ids in asked:
            draw = 7 * sum(ids) + 13 * len(ids) + 5 * step + 11 * seen[ids]
            drawn.append(completions[draw % len(completions)])
            seen[ids] += 1
        first = self.accelerator.process_index * len(prompt_ids)
        return drawn[first : first + len(prompt_ids)]


def _everyones(trainer, prompt_ids: list) -> list:
    if trainer.accelerator.num_processes == 1:
        return prompt_ids
    gathered: list[Any] = [None] * trainer.accelerator.num_processes
    torch.distributed.all_gather_object(gathered, prompt_ids)
    return [ids for ranks in gathered for ids in ranks]


class TabledPPO(Tabled, PPOTrainer):
    pass


class TabledGDC(Tabled, GDCTrainer):
    pass


def _judged(prompts, completions, completion_ids, **columns):
    """The toy's reward, which does not apply to some prompts."""
    rewards = toy_reward(prompts, completions, completion_ids)
    return [None if len(prompt) == 3 else reward for prompt, reward in zip(prompts, rewards, strict=True)]


def _forbidding(prompts, completions, completion_ids, **columns):
    """The same, which forbids some completions and does not apply to others."""
    rewards = _judged(prompts, completions, completion_ids)
    return [
        -math.inf if ids[0] == 2 else None if ids[:2] == [1, 1] else reward
        for ids, reward in zip(completion_ids, rewards, strict=True)
    ]


def _ppo(models: Path, folder: Path, num_processes: int, lora: bool, changes: dict) -> Trainer:
    args = PPOConfig(
        str(folder), normalize_advantages=True, vf_coef=0.5, target_kl=0.02, kl_horizon=30,
        critic="separate" if lora else "shared", **SETTINGS | ROLLOUTS | batches(6, 12, num_processes) | changes,
    )  # fmt: skip
    return TabledPPO(str(models / "policy"), _judged, sharded_to_the_last(args), **_rollout_arguments(models, lora))


def _gdc(models: Path, folder: Path, num_processes: int, lora: bool, changes: dict) -> Trainer:
    path = {"beta_init": 2.0, "beta_init_steps": 4, "ess_min": 2.0}
    options = {"divergence": "log_variance"} if lora else {"divergence": "forward_kl", **path}
    args = GDCConfig(
        str(folder), **SETTINGS | ROLLOUTS | options | batches(6, 12, num_processes) | changes
    )  # fmt: skip
    return TabledGDC(
        str(models / "policy"), _forbidding, sharded_to_the_last(args), **_rollout_arguments(models, lora)
    )


def _rollout_arguments(models: Path, lora: bool) -> dict[str, Any]:
    # with an adapter, the prior is the policy without it
    prior = {} if lora else {"ref_model": str(models / "prior")}
    return {
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
        "eval_dataset": Dataset.from_dict({"prompt": PROMPTS}),
        "processing_class": TOY.tokenizer,
        "peft_config": LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]) if lora else None,
        **prior,
    }


def _reward(models: Path, folder: Path, num_processes: int, lora: bool, changes: dict) -> Trainer:
    texts = [text for text in dict.fromkeys(TOY.completions) if text]
    said = [["chosen", "tie", "chosen"], ["rejected", "chosen", "rejected"], ["chosen"] * 3]
    pairs = Dataset.from_dict(
        {
            "chosen": [texts[(3 * i) % len(texts)] for i in range(32)],
            "rejected": [texts[(3 * i + 1) % len(texts)] for i in range(32)],
            "annotators": [["u", "v", "w"]] * 32,
            "annotator_votes": (said * 11)[:32],
        }
    )
    options = {"learning_rate": 0.5, "num_members": 3, "annotator_reliability": True}
    args = RewardConfig(
        str(folder), ensemble="lora" if lora else "heads",
        **SETTINGS | options | batches(4, 6, num_processes) | changes,
    )  # fmt: skip
    return RewardTrainer(
        str(models / "prior"),
        sharded_to_the_last(args),
        train_dataset=pairs,
        eval_dataset=pairs.select(range(11)),  # the last batch is not full
        processing_class=TOY.tokenizer,
        peft_config=LoraConfig(r=2, task_type="SEQ_CLS") if lora else None,
    )


def batches(train: int, evaluate: int, num_processes: int) -> dict[str, int]:
    """Sizes for each process, of these for all."""
    return {
        "per_device_train_batch_size": train // num_processes,
        "per_device_eval_batch_size": evaluate // num_processes,
    }


def sharded_to_the_last(args: Any) -> Any:
    """ZeRO-3 leaves weights as small as the toy's whole, unless told otherwise."""
    if args.deepspeed_plugin is not None:
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return args


def run(training: str, models: Path, folder: Path, num_processes: int) -> Trainer:
    """Train without interruption; then let a second run go on from the first step of that one."""
    trainer = trainer_of(training, models, folder, num_processes)
    trainer.train()
    evaluation = trainer.evaluate()
    trainer.save_model(str(folder / "final"))
    if trainer.accelerator.is_main_process:
        (folder / "log.json").write_text(json.dumps([*trainer.state.log_history, evaluation]))
    resume(training, models, folder, num_processes, folder / "checkpoint-1", folder / "resumed")
    return trainer


def resume(
    training: str, models: Path, folder: Path, num_processes: int, checkpoint: Path, saved: Path, **changes: Any
) -> None:
    """A new run from a checkpoint to the last step; its models go to `saved`."""
    trainer = trainer_of(training, models, folder / "again", num_processes, **changes)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    trainer.save_model(str(saved))


class Drawing(PPOTrainer):
    """Draws for itself, and keeps how long the completions of each rollout were in each process."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        drawn = super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        self.lengths = [*getattr(self, "lengths", []), _everyones(self, [max(map(len, drawn))])]
        return drawn


def run_ragged(models: Path, folder: Path, num_processes: int) -> tuple[list[list[int]], list[dict[str, float]]]:
    """
    Trainings and evaluations whose last batches are not full, on completions that end when they will.

    Returns:
        The longest completion in each process, of each rollout; and the metrics of the evaluations.
    """
    changes = {"max_completion_length": 12, "num_generations": 2, "max_steps": 8, "save_strategy": "no"}
    args = PPOConfig(
        str(folder / "ppo"), **SETTINGS | ROLLOUTS | batches(4, 4, num_processes) | changes
    )  # fmt: skip
    data = _rollout_arguments(models, lora=False)
    data |= {name: data[name].select(range(7)) for name in ("train_dataset", "eval_dataset")}
    drawing = Drawing(str(models / "policy"), _judged, sharded_to_the_last(args), **data)
    drawing.train()
    changes = {"save_strategy": "no", "max_steps": 10}
    reward = trainer_of("reward", models, folder / "reward", num_processes, **changes)
    reward.train_dataset = reward.train_dataset.select(range(9))
    reward.train()
    return drawing.lengths, [drawing.evaluate(), reward.evaluate()]


# a rollout is one micro-batch, from which one step or two are taken
ONE_FORWARD: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo-lora": {"gradient_checkpointing": True},
    "gdc": {"num_iterations": 1, "max_steps": 5},  # of which the last is measured
    "gdc-lora": {"num_iterations": 1},
}


def run_by_one_forward(models: Path, folder: Path, num_processes: int, twice: bool = False) -> dict[str, Any]:
    """
    The trainings by steps that learn from the forward that scored their rollout; `twice`: by one of their own.

    The first rollout of each fails when it is scored and not yet learnt from, and is made anew.

    Returns:
        Of each training the weights, the largest change of one, whether all processes part them, and how often the
        trunk scored completions.
    """
    found: dict[str, Any] = {}
    for training, changes in ONE_FORWARD.items():
        sizes = {"gradient_accumulation_steps": 1, "max_steps": 3, "save_strategy": "no"}
        sizes |= batches(12, 12, num_processes)
        trainer = trainer_of(training, models, folder / training, num_processes, **sizes | changes)
        _fail_first(trainer)
        before = {name: weight.detach().clone() for name, weight in base_causal_lm(trainer.model).named_parameters()}
        with patch.object(type(trainer), "step_is_rollout", False) if twice else nullcontext():
            forwards = _train_and_count(trainer)
        weights = dict(base_causal_lm(trainer.accelerator.unwrap_model(trainer.model)).named_parameters())
        after = {name: _whole(weight).detach().clone() for name, weight in weights.items()}
        found[training] = {
            "forwards": forwards,
            "sharded": all(isinstance(weight, DTensor) for weight in weights.values()),
            "weights": after,
            "moved": max((after[name] - weight).abs().max().item() for name, weight in before.items()),
        }
    return found


def _train_and_count(trainer: Any) -> int:
    forwards: list[dict] = []
    trunk = base_causal_lm(trainer.model).base_model
    trunk.register_forward_pre_hook(lambda module, args, kwargs: forwards.append(kwargs), with_kwargs=True)
    trainer.train()
    return sum(kwargs.get("use_cache") is False for kwargs in forwards)


def _fail_first(trainer: Any) -> None:
    rollout = trainer._generate_and_score_completions

    def at_second_try(inputs):
        trainer._generate_and_score_completions = rollout
        with patch.object(trainer, "_calculate_rewards", side_effect=OSError("the reward is out")), suppress(OSError):
            rollout(inputs)
        return rollout(inputs)

    trainer._generate_and_score_completions = at_second_try


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors that were saved: of the policy or its adapter, of the critic, of the members."""
    return {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
