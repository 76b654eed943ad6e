"""Preferences → reward model → policy on the bundled toy, where the gold reward behind the preferences is known.

One policy is trained against a reward model that was fitted to few, noisy comparisons, another against the pessimistic
pool of an ensemble fitted to the same comparisons, at the same low β. The recipe plots the proxy reward and the gold
reward of both over training: over-optimisation (Gao, Schulman & Hilton 2023, arXiv 2210.10760), and how an ensemble
reduces it (Coste et al. 2024, arXiv 2310.02743). Departures: the members are LoRA adapters on one base, each with its
own head and bootstrap of the pairs; before they are pooled, they are centered on the prior's completions of each
prompt, since comparisons do not fix their zero.

In some minutes on two CPU cores, with three repetitions on different pairs:

    accelerate launch --num_processes 1 recipes/rlhf.py

Members may share an error: with `--num_pairs 40`, every single model loses gold reward (−0.56 ± 0.18 from its best),
and so does one ensemble of three. `--reward_rule mean` shows the effect of averaging alone.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback

from rlhf_bayes import Completions, LanguageModel, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, toy
from rlhf_bayes.commands.flags import load_pooled_reward
from rlhf_bayes.commands.flags.flag_parser import FlagParser
from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.diagnostics import plot_overoptimization
from rlhf_bayes.numerics import POOLING_RULES
from rlhf_bayes.numerics.pooling import rules_help
from rlhf_bayes.toy.annotate import ERROR_RATES
from rlhf_bayes.toy.rewards import sentiment_reward

PLAIN = {"use_cpu": not torch.cuda.is_available(), "bf16": False, "gradient_checkpointing": False}
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
MAX_COMPLETION_LENGTH = 32


@dataclass
class Arguments:
    """Flags of the experiment."""

    annotator: str = field(default="average", metadata={"help": "Whose votes to use.", "choices": list(ERROR_RATES)})
    num_pairs: int = field(default=60, metadata={"help": "Pairs to learn from; ties are left out."})
    num_members: int = field(default=4, metadata={"help": "Members of the ensemble."})
    reward_rule: str = field(
        default="pessimistic",
        metadata={"help": f"Their pool. {rules_help()}", "choices": list(POOLING_RULES)},
    )
    reward_epochs: int = field(default=12, metadata={"help": "Epochs of reward training."})
    reward_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of reward training."})
    beta: float = field(default=0.01, metadata={"help": "β: reward per nat, in standard deviations of the reward."})
    max_steps: int = field(default=250, metadata={"help": "Optimizer steps of PPO."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of PPO."})
    batch_size: int = field(default=32, metadata={"help": "Completions in a step of PPO, eight for each prompt."})
    logging_steps: int = field(default=10, metadata={"help": "Each point of the plot is the mean of this many steps."})
    num_seeds: int = field(default=3, metadata={"help": "Repetitions, each with its own pairs and weights."})
    output_dir: str = field(default="runs/rlhf", metadata={"help": "Where to write models and the plot."})


@dataclass(frozen=True)
class Run:
    """A policy's training: one entry before it and one per logging step. Rewards are in sd under the prior."""

    steps: list[int]
    proxy: list[float]
    gold: list[float]
    kl: list[float]

    def at(self, index: int) -> tuple[float, float, float]:
        return self.proxy[index], self.gold[index], self.kl[index]

    @property
    def best(self) -> int:
        """Index of the highest gold reward, at which one would stop if one could observe it."""
        return max(range(len(self.gold)), key=lambda index: self.gold[index])


def judged_pairs(annotator: str, num_pairs: int, seed: int) -> Dataset:
    """Pairs of the toy with the votes of one annotator, without ties."""
    rows = []
    for row in toy.preferences("train").shuffle(seed=seed):
        vote = row["annotator_votes"][row["annotators"].index(annotator)]
        chosen, rejected = ("rejected", "chosen") if vote == "rejected" else ("chosen", "rejected")
        if vote != "tie":
            rows.append({"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected]})
    if not 0 < num_pairs <= len(rows):
        raise ValueError(f"`num_pairs` must be from 1 to {len(rows)}, those that are no ties, got {num_pairs}.")
    return Dataset.from_list(rows[:num_pairs])


def train_reward(
    args: Arguments, folder: str, pairs: Dataset, num_members: int, draws: Completions, seed: int
) -> None:
    """Train a reward model or an ensemble, normalise it on the prior's completions, and save it in `folder`."""
    trainer = RewardTrainer(
        toy.model_path(),
        RewardConfig(
            folder, num_members=num_members, ensemble="lora", seed=seed, num_train_epochs=args.reward_epochs,
            learning_rate=args.reward_learning_rate, per_device_train_batch_size=16, **PLAIN, **QUIET,
        ),
        train_dataset=pairs,
        peft_config=LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear"),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()  # an error of the normalisation costs no training
    trainer.normalize(draws.prompts, draws.completions, f"{len(draws):,} completions of the prior")
    trainer.save_model()


def train_policy(args: Arguments, folder: str, reward, draws: Completions, seed: int) -> Run:
    """Train by PPO against `reward`. The gold reward has weight 0, so it is only logged."""
    trainer = PPOTrainer(
        toy.model_path(),
        [reward, sentiment_reward],
        PPOConfig(
            folder, reward_weights=[1.0, 0.0], beta=args.beta, max_steps=args.max_steps,
            learning_rate=args.learning_rate, lr_scheduler_type="constant", num_generations=8, seed=seed,
            per_device_train_batch_size=args.batch_size, max_completion_length=MAX_COMPLETION_LENGTH,
            logging_steps=args.logging_steps, **PLAIN, **QUIET,
        ),
        train_dataset=Dataset.from_dict({"prompt": toy.prompts()}),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    history = [entry for entry in trainer.state.log_history if "posterior/kl_to_prior" in entry]
    curves = []
    for function, key in zip((reward, sentiment_reward), trainer.reward_func_names, strict=True):
        under_prior = torch.tensor(function(prompts=draws.prompts, completions=draws.completions))  # (B,)
        mean, spread = under_prior.mean().item(), under_prior.std().item()
        curves.append([0.0] + [(entry[f"rewards/{key}/mean"] - mean) / spread for entry in history])
    kl = [0.0] + [entry["posterior/kl_to_prior"] for entry in history]
    return Run([0] + [entry["step"] for entry in history], *curves, kl)


def main() -> None:
    (args,) = FlagParser((Arguments,)).parse_args_and_config()
    if args.num_seeds < 1:
        raise ValueError(f"`num_seeds` must be at least 1, got {args.num_seeds}. It counts repetitions.")
    quiet()
    console = Console()
    prior = LanguageModel(toy.model_path(), max_completion_length=MAX_COMPLETION_LENGTH, batch_size=256)
    draws = prior.sample(toy.prompts(), n=32, generator=torch.Generator().manual_seed(0))

    names = {"single reward model": 1, f"{args.reward_rule} ensemble": args.num_members}
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for seed in range(args.num_seeds):
        pairs = judged_pairs(args.annotator, args.num_pairs, seed)
        for name, num_members in names.items():
            folder = f"{args.output_dir}/{name.replace(' ', '_')}_{seed}"
            with console.status(f"{seed + 1} of {args.num_seeds}, {name}: reward from {len(pairs)} pairs"):
                train_reward(args, f"{folder}/reward", pairs, num_members, draws, seed)
                rule = args.reward_rule if num_members > 1 else "mean"
                reward = load_pooled_reward(f"{folder}/reward", rule, prior, toy.prompts(), args.beta, seed=seed)
            with console.status(f"{seed + 1} of {args.num_seeds}, {name}: {args.max_steps} steps of PPO"):
                runs[name].append(train_policy(args, f"{folder}/policy", reward, draws, seed))

    console.print(table(runs))
    plot = Path(args.output_dir, "overoptimization.png")
    means = {name: mean_curves(of) for name, of in runs.items()}
    plot_overoptimization(means, plot, ylabel="reward (sd under the prior)")
    console.print(f"Proxy and gold reward over training, mean of {args.num_seeds} seeds, in {plot}.")


def mean_curves(runs: list[Run]) -> tuple[list[int], list[float], list[float]]:
    """Steps, and proxy and gold reward averaged over seeds."""
    curves = torch.tensor([[run.proxy, run.gold] for run in runs]).mean(0)  # (2, steps)
    return runs[0].steps, *curves.tolist()


def table(runs: dict[str, list[Run]]) -> Table:
    """Proxy, gold and KL to the prior where gold was best and at the end: a row per policy, and means over seeds."""
    title = "Rewards in sd under the prior, where both start at 0; KL in nats; * where gold was highest"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column("", min_width=max(len(word) for name in runs for word in name.split()))
    for column in ("seed", "step*", "proxy*", "gold*", "KL*", "proxy", "gold", "KL"):
        table.add_column(column, justify="right")
    for name, of in runs.items():
        rows = torch.tensor([[run.steps[run.best], *run.at(run.best), *run.at(-1)] for run in of])  # (seeds, 7)
        lines = dict(zip(map(str, range(len(rows))), rows, strict=True))
        if len(rows) > 1:
            lines |= {"mean": rows.mean(0), "±": rows.std(0) / math.sqrt(len(rows))}
        for index, (label, (step, *values)) in enumerate(lines.items()):
            table.add_row("" if index else name, label, f"{step:.0f}", *(f"{value:.2f}" for value in values))
        table.add_section()
    return table


if __name__ == "__main__":
    main()
