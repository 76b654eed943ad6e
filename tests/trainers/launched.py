"""
A training that is launched as a script, by one process or by several. Not a test module.

    python launched.py FOLDER MODE [NUM_PROCESSES]

MODE `gdc`: GDCTrainer by several divergences, on completions by prompt, so that any number of processes sees the same
rollouts; then with completions of the store beside FOLDER, a share of the batch or all of it. Writes weights.pt.
MODE `slow`: a long run with checkpoints, to be interrupted.
"""

import math
import os
import signal
import sys
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer
from rlhf_bayes.likelihoods import MomentLikelihood
from rlhf_bayes.store import CompletionStore
from rlhf_bayes.testing import EnumerableLM, toy_reward

torch.set_num_threads(1)
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True}
PROMPTS = ["a", "b a", "b a b a", "b", "a a", "b b a", "a b", "a a a a b", "b b", "a b a", "a a b", "b a a b"]


TOY = EnumerableLM(vocab_size=4, max_completion_length=3)


class GDCTableTrainer(GDCTrainer):
    """Draws nothing: the completion is a function of the prompt, of the step and of the row among all processes."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        completions, step = TOY.completion_ids, self.state.global_step
        first = self.accelerator.process_index * len(prompt_ids)
        return [
            completions[(7 * sum(ids) + 13 * len(ids) + 5 * step + 11 * (first + row)) % len(completions)]
            for row, ids in enumerate(prompt_ids)
        ]


def forbidding(prompts, completions, completion_ids, **kwargs):
    rewards = toy_reward(prompts, completions, completion_ids)
    return [
        -math.inf if ids[0] == 2 else None if ids[:2] == [1, 1] else reward
        for ids, reward in zip(completion_ids, rewards, strict=True)
    ]


def length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def by_divergence(folder: Path, num_processes: int) -> None:
    results = {}
    for divergence in ("forward_kl", "log_variance", "tv"):
        trainer, results[divergence] = of_divergence(folder, num_processes, divergence)
    _, results["a share from a store"] = with_store(
        folder, num_processes, 16, replay_store=str(folder.parent / "store"), store_share=0.5
    )
    actors = {"actor_weights": str(folder / "weights"), "divergence": "log_variance", "save_on_sigterm": True}
    saved, results["actors"] = with_store(
        folder / "actors", num_processes, 12, save_strategy="steps", save_steps=3, **actors
    )
    checkpoint = f"{saved.args.output_dir}/checkpoint-3"
    _, results["actors, resumed"] = with_store(folder / "resumed", num_processes, 12, checkpoint, **actors)
    if trainer.accelerator.is_main_process:
        torch.save(results, folder / "weights.pt")
    leave(trainer)


def of_divergence(folder: Path, num_processes: int, divergence: str) -> tuple[GDCTrainer, dict]:
    policy, prior = TOY.random_policy(noise=0.05), TOY.random_policy(noise=0.0)
    # what the table says is not what the policy would draw: weights soon are large
    weighted = {"ess_min": 2.0, "beta_init": 2.0, "beta_init_steps": 4, "learning_rate": 1e-3}
    options = {"log_variance": {"learning_rate": 0.02}, "forward_kl": weighted}
    # a baseline over completions in two processes, a proposal that all must replace together, features of all
    options["tv"] = {"proposal": "adaptive", "beta": None, "learning_rate": 0.02}
    evidence = {"likelihood": MomentLikelihood({"length": length}, {"length": 0.7})}
    evidence = evidence if divergence == "tv" else {"reward_funcs": forbidding}
    args = GDCConfig(
        output_dir=str(folder), save_strategy="no", max_completion_length=3, num_generations=4, divergence=divergence,
        per_device_train_batch_size=6 // num_processes, gradient_accumulation_steps=2, max_steps=6, num_iterations=2,
        per_device_eval_batch_size=12 // num_processes, max_grad_norm=0.0, optim="sgd",
        lr_scheduler_type="constant", logging_steps=1, ddp_find_unused_parameters=False,
        **QUIET | {"beta": 0.5} | options[divergence],
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    arguments = {"train_dataset": dataset, "eval_dataset": dataset, "processing_class": TOY.tokenizer}
    trainer = GDCTableTrainer(policy, args=args, ref_model=prior, **evidence, **arguments)
    check_launch(trainer, num_processes)
    trainer.train()
    evaluated = trainer.evaluate()
    return trainer, found_in(trainer) | {"eval_loss": evaluated["eval_loss"]}


def with_store(folder: Path, num_processes: int, rows: int, checkpoint=None, **options) -> tuple[GDCTrainer, dict]:
    actors = "actor_weights" in options
    args = GDCConfig(
        output_dir=str(folder), max_completion_length=3, num_generations=4, max_steps=6, max_grad_norm=0.0, beta=0.5,
        per_device_train_batch_size=rows // num_processes, learning_rate=0.02, lr_scheduler_type="constant",
        optim="sgd", logging_steps=1, ddp_find_unused_parameters=False,
        **QUIET | {"save_strategy": "no"} | options,
    )  # fmt: skip
    data = (
        CompletionStore(folder.parent.parent / "store") if actors else Dataset.from_dict({"prompt": TOY.prompts * 4})
    )
    rewards = None if actors else toy_reward
    trainer = GDCTableTrainer(
        TOY.random_policy(noise=0.0), rewards, args, train_dataset=data, processing_class=TOY.tokenizer
    )
    check_launch(trainer, num_processes)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, found_in(trainer)


def found_in(trainer) -> dict:
    weights = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    names = ("gdc/", "posterior/", "reward", "entropy", "actors/staleness", "actors/ess", "num_tokens")
    log = [{n: v for n, v in entry.items() if n.startswith(names)} for entry in trainer.state.log_history]
    return {"weights": weights, "log": log}


def check_launch(trainer, num_processes: int) -> None:
    # several obvious ways to launch end with one process and no error
    assert trainer.accelerator.num_processes == num_processes, trainer.accelerator.num_processes
    expected = "NO" if num_processes == 1 else "MULTI_"
    assert str(trainer.accelerator.distributed_type).split(".")[-1].startswith(expected)


def leave(trainer) -> None:
    # a process that leaves while its group is up may abort
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    # one launch in some thirty aborts after all is done, as gloo's threads meet an interpreter that is gone
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def slowly(folder: Path) -> None:
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
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if sys.argv[2] == "gdc":
        by_divergence(folder, int(sys.argv[3]))
    else:
        slowly(folder)
