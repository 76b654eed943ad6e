r"""Evaluates reward models on pairs that they were not trained on: accuracy, log loss, calibration, over-optimisation.

Over-optimisation is measured by the gold reward of the best of n completions that a model chooses (Gao, Schulman &
Hilton 2023, arXiv 2210.10760).

Calibration is that of raw logits, Δ_raw = Δ/gain: normalisation rescales Δ, which gives β its meaning, but σ(Δ) is
then no longer the probability that was fitted. Best-of-n is estimated from all subsets of the draws, with rewards in
standard deviations under the language model that draws. An ensemble has a line for its mean, and one for
`--reward_rule`.

On the bundled preferences, with the sentiment that simulated their annotators as gold reward, in some seconds:

    python reward_models/evaluate.py --reward_model_path runs/reward_model

Any models, side by side, on any pairs; `--gold_reward module:function` and `--policy_name_or_path` add best-of-n:

    python reward_models/evaluate.py --reward_model_path runs/one runs/four \
        --dataset_name trl-lib/ultrafeedback_binarized --dataset_split test --max_pairs 1000
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlhf_bayes import LanguageModel, toy
from rlhf_bayes.commands.flags import load_preferences, load_reward_func, prompts_of_pairs
from rlhf_bayes.commands.flags.flag_parser import FlagParser
from rlhf_bayes.commands.quiet import quiet_libraries
from rlhf_bayes.diagnostics import plot_overoptimization, plot_reliability, preference_table
from rlhf_bayes.numerics import pool
from rlhf_bayes.numerics.pooling import POOLING_RULES, pool_centered, rules_help
from rlhf_bayes.rewards import RewardEnsemble, RewardModel, RewardScorer, load_reward
from rlhf_bayes.rewards.lengths import OVERLONG
from rlhf_bayes.trainers.reward.held_out import BestOfN, best_of_n, held_out_rewards, pairs_that_fit

TOY_GOLD = "rlhf_bayes.toy.rewards:sentiment_reward"


@dataclass
class Arguments:
    """Flags for the reward models, and for the data to evaluate them on."""

    reward_model_path: list[str] = field(
        default_factory=list, metadata={"help": "Folders of reward models or ensembles, one row for each."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Preferences: a name on the hub, a .json, .jsonl, .parquet or .csv file (.gz too), or a "
                  "folder of `save_to_disk`. Default: the bundled ones that are for testing."},
    )  # fmt: skip
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_split: str = field(default="test", metadata={"help": "Split to judge on."})
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of columns that are called otherwise: `chosen=better rejected=worse votes=counts`."},
    )
    drop_columns: list[str] = field(default_factory=list, metadata={"help": "Columns to leave out."})
    max_pairs: int | None = field(
        default=None, metadata={"help": "Evaluate on this many pairs, chosen at random. Default: all."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest text, in tokens. Default, and at most: the number of positions of each model."},
    )
    overlong: str = field(
        default="drop",
        metadata={"help": "What happens to pairs with a longer text: 'drop' them for all models, 'truncate' them from "
                  "the left, or 'error'.", "choices": list(OVERLONG)},
    )  # fmt: skip
    gold_reward: str | None = field(
        default=None,
        metadata={"help": "Reward function, `module:function`, that scores the best of n completions that a model "
                  "chooses. Default: sentiment, with the bundled preferences only."},
    )  # fmt: skip
    policy_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Language model to draw completions from. Default: the bundled one, with the bundled "
            "preferences only."
        },
    )
    num_prompts: int = field(default=32, metadata={"help": "Number of prompts to draw completions for."})
    num_samples: int = field(default=128, metadata={"help": "Completions for each prompt, which is the largest n."})
    max_completion_length: int = field(default=32, metadata={"help": "Longest completion, in tokens."})
    reward_rule: str = field(
        default="min",
        metadata={
            "help": f"How to pool the members of an ensemble; the mean is always shown too. {rules_help()}",
            "choices": list(POOLING_RULES),
        },
    )
    reward_beta: float | None = field(default=None, metadata={"help": "β for the rules that have one."})
    reward_penalty: float | None = field(default=None, metadata={"help": "Weight of the variance, for its rule."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where images go."})
    seed: int = field(default=0, metadata={"help": "Of all draws."})


def parse_arguments() -> Arguments:
    (args,) = FlagParser((Arguments,)).parse_args_and_config()
    if not args.reward_model_path:
        raise ValueError(
            "`--reward_model_path` must name at least one folder of a reward model, got none. Train one first: "
            "`accelerate launch reward_models/train.py` writes runs/reward_model in about a minute."
        )
    missing = [
        path for path in args.reward_model_path if path.startswith((".", "/", "runs/")) and not Path(path).is_dir()
    ]
    if missing:
        raise FileNotFoundError(
            f"`--reward_model_path` must be a folder that exists, or a name on the hub, got {missing[0]!r}, which is "
            f"not there when read from {Path.cwd()}. Train one with reward_models/train.py, or correct the path."
        )
    pool(torch.zeros(1, 1), args.reward_rule, args.reward_beta, args.reward_penalty)  # refuses what it cannot use
    if args.dataset_name is None:
        args.gold_reward = args.gold_reward or TOY_GOLD
        args.policy_name_or_path = args.policy_name_or_path or toy.model_path()
    if (args.gold_reward is None) != (args.policy_name_or_path is None):
        raise ValueError(
            "`--gold_reward` and `--policy_name_or_path` must be given together, got "
            f"{args.gold_reward} and {args.policy_name_or_path}: one judges the completions of the other."
        )
    return args


def main() -> None:
    quiet_libraries()
    args, console = parse_arguments(), Console()
    folder = Path(args.output_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # data and gold reward come before the models, so that wrong names are found at once
    pairs = load_preferences(
        args.dataset_name or str(toy.preferences_path("test")),
        args.dataset_split,
        args.dataset_config,
        args.columns,
        args.drop_columns,
        args.max_pairs,
        args.seed,
    )
    gold = load_reward_func(args.gold_reward) if args.gold_reward else None
    prompts = []
    if gold is not None:
        shuffled = pairs.shuffle(seed=args.seed)
        prompts = prompts_of_pairs(shuffled, args.num_prompts, args.policy_name_or_path, args.max_completion_length)
    paths = args.reward_model_path
    models = {name: load_reward(path, device=device) for name, path in zip(short_names(paths), paths, strict=True)}

    # pairs
    with console.status(f"Scoring {len(pairs):,} pairs"):
        pairs = pairs_that_fit(list(models.values()), pairs, args.max_length, args.overlong)
        held_out = {
            name: held_out_rewards(model, pairs, args.max_length, args.overlong) for name, model in models.items()
        }
    no_model = next(iter(held_out.values())).without_a_model
    metrics = {"Δ = 0": no_model.metrics} | {name: rewards.metrics for name, rewards in held_out.items()}
    console.print(preference_table(metrics, f"{len(pairs):,} pairs (raw rewards)"))
    folder.mkdir(parents=True, exist_ok=True)
    plot_reliability(
        {name: rewards.bins for name, rewards in held_out.items()}, folder / "reliability.png", len(pairs)
    )
    console.print(f"Calibration in {folder / 'reliability.png'}.")
    if gold is None:
        return

    # best of n
    with console.status(f"Drawing {args.num_samples} completions of up to {args.num_prompts} prompts"):
        proxies, gold_rewards = draw_and_score(args, models, gold, prompts, device)
    ns = [2**power for power in range(args.num_samples.bit_length()) if 2**power <= args.num_samples]
    curves = {"gold itself": best_of_n(gold_rewards, gold_rewards, ns)}
    curves |= {name: best_of_n(proxy, gold_rewards, ns) for name, proxy in proxies.items()}
    console.print(best_of_n_table(curves, ns))
    plot = folder / "best_of_n.png"
    plot_overoptimization(curves, plot, "√KL(best of n‖prior) (√nats, at most)", "reward (sd under the prior)")
    console.print(f"Proxy and gold reward of the best of n in {plot}.")


def short_names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    for depth in range(1, max(len(Path(path).parts) for path in paths)):
        names = ["/".join(Path(path).parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return paths


def draw_and_score(
    args: Arguments, models: dict[str, RewardModel | RewardEnsemble], gold, prompts: list, device: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Proxy rewards by name, and gold rewards, of N completions for each of P prompts: (P, N)."""
    policy = LanguageModel(args.policy_name_or_path, max_completion_length=args.max_completion_length)
    policy.model.to(device)
    draws = policy.sample(prompts, args.num_samples, torch.Generator().manual_seed(args.seed))
    shape = (len(prompts), args.num_samples)
    proxies = {}
    for name, model in models.items():
        if isinstance(model, RewardModel):
            proxies[name] = model.rewards(draws.prompts, draws.completions).view(shape)
            continue
        members = model.member_rewards(draws.prompts, draws.completions).view(-1, *shape)  # (K, P, N)
        proxies[f"{name}, mean"] = members.mean(0)
        if args.reward_rule != "mean":
            # comparisons do not fix a constant for each prompt, so each member is centered on the draws
            centers = members.mean(-1, keepdim=True)  # (K, P, 1)
            pooled = pool_centered(members, centers, args.reward_rule, args.reward_beta, args.reward_penalty)
            proxies[f"{name}, {args.reward_rule}"] = pooled  # (P, N)
    return proxies, RewardScorer(gold)(draws.prompts, draws.completions, draws.completion_ids)[:, 0].view(shape)


def best_of_n_table(curves: dict[str, BestOfN], ns: list[int]) -> Table:
    """A row for each proxy: the gold reward of its best of n, and the proxy's own reward in brackets."""
    table = Table(title="Gold reward of the best of n, proxy in brackets (standard deviations under the prior)")
    table.add_column("best by")
    for n in ns[::-2][::-1]:
        table.add_column(f"n = {n}", justify="right")
    for name, curve in curves.items():
        cells = dict(zip(ns, zip(curve.gold, curve.proxy, strict=True), strict=True))
        table.add_row(name, *(f"{cells[n][0]:.2f} ({cells[n][1]:.2f})" for n in ns[::-2][::-1]))
    return table


if __name__ == "__main__":
    main()
