"""A store of completions as a run: its completions, and what other β would give."""

from pathlib import Path

import torch
from torch import Tensor

from rlhf_bayes.report.run import Run, Sample, text_of
from rlhf_bayes.report.what_if_table import betas_around, what_if_of
from rlhf_bayes.store import CompletionStore
from rlhf_bayes.store.scored_completion import FEATURE, REWARD
from rlhf_bayes.store.stored_draws import StoredDraws


def stored_run(folder: str | Path, name: str) -> Run:
    """
    The run of a store, for the report.

    Args:
        folder (`str` or `Path`): The store.
        name (`str`): Name of the run.
    """
    store = CompletionStore(folder)
    draws = StoredDraws.of(store)
    columns = {
        column.removeprefix(prefix): list(draws.rows[column])
        for prefix in (REWARD, FEATURE)
        for column in draws.rows.column_names
        if column.startswith(prefix)
    }
    texts = zip(draws.prompt_index.tolist(), draws.rows["completion"], draws.rows["step"], strict=True)
    samples = [
        Sample(
            text_of(draws.prompts[prompt]),
            completion,
            {key: values[row] for key, values in columns.items() if values[row] is not None},
            step,
        )
        for row, (prompt, completion, step) in enumerate(texts)
    ]
    made = {key: value for key, value in store.provenance.as_dict().items() if not isinstance(value, dict)}
    sampling = {"beta": None, "reward_names": store.reward_names, "settings": made | {"drawn_by": len(draws.names)}}
    if store.reward_names:
        rewards, log_ratios = by_prompt(draws, draws.rewards(store.reward_names))
        sampling |= what_if_of(rewards, betas_for(rewards), log_ratios)
    return Run(name=name, folder=Path(folder), samples=samples, settings=sampling["settings"], sampling=sampling)


def by_prompt(draws: StoredDraws, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """
    Rewards and log π0 − log q (nats) of stored completions, (P, n) each: n completions of each prompt.

    n is that of the prompt with the fewest completions to which a reward applies.

    Args:
        draws ([`~rlhf_bayes.store.stored_draws.StoredDraws`]): The completions.
        rewards (`Tensor` (N,)): Their rewards, nan where none applies.

    Raises:
        ValueError: if a prompt has fewer than 2 completions with a reward.
    """
    ratios = draws.log_prior - draws.log_proposal
    scored = [
        ((draws.prompt_index == prompt) & ~rewards.isnan()).nonzero()[:, 0] for prompt in range(len(draws.prompts))
    ]
    n = min(len(rows) for rows in scored)
    if n < 2:
        (prompt, *_) = [prompt for prompt, rows in zip(draws.prompts, scored, strict=True) if len(rows) == n]
        raise ValueError(
            f"A store must hold at least 2 completions with a reward of each prompt, got {n} of {prompt!r}: one has "
            "no spread. Draw more."
        )
    which = torch.stack([rows[:n] for rows in scored])  # (P, n)
    return rewards.double()[which], ratios[which]


def betas_for(rewards: Tensor) -> list[float]:
    """Seven values of β around the standard deviation of the rewards (P, n) within a prompt, rounded."""
    spread = torch.where(rewards.isfinite(), rewards, torch.nan)
    deviation = (spread - spread.nanmean(-1, keepdim=True)).square().nanmean().sqrt().item()
    return betas_around(float(f"{deviation:.1g}") if deviation > 0 else 1.0)
