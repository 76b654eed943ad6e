"""`rlhf-bayes what-if`: estimates the posteriors of several β from stored completions, without a model."""

import argparse

from rich.console import Console

from rlhf_bayes.commands.sampling import what_if_table
from rlhf_bayes.report import what_if_of
from rlhf_bayes.report.stored_run import betas_for, by_prompt
from rlhf_bayes.store import CompletionStore
from rlhf_bayes.store.stored_draws import StoredDraws


def run(args: argparse.Namespace) -> None:
    """Print the table, for parsed arguments."""
    store = CompletionStore(args.store)
    draws = StoredDraws.of(store)
    clip = None if args.reward_clip_range is None else (args.reward_clip_range[0], args.reward_clip_range[1])
    rewards, log_ratios = by_prompt(
        draws, draws.rewards(store.reward_names, args.reward_weights, clip, args.missing_eos_penalty)
    )
    betas = sorted(args.beta or betas_for(rewards), reverse=True)
    found = what_if_of(rewards, betas, log_ratios)
    console = Console()
    console.print(what_if_table(found["what_if"], None, "From stored completions alone, for their prompts."))
    console.print(
        f"{len(draws):,} completions of {len(draws.prompts)} prompts, {rewards.size(1)} of each used; rewards: "
        f"{', '.join(store.reward_names)}. Weighted: {draws.weighting}.",
        highlight=False,
        markup=False,
    )
