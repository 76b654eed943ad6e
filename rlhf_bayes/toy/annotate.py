"""Writes the bundled preferences: pairs drawn from the bundled model, judged by three simulated annotators.

    python -m rlhf_bayes.toy.annotate

The gold reward is `rlhf_bayes.toy.rewards.sentiment`, g. An annotator prefers a over b by the model of Bradley and
Terry, and votes for the other text with probability ε, the annotator's error rate:

    P(vote for a) = (1−ε)·σ(Δ/τ) + ε·σ(−Δ/τ),    Δ = g(a) − g(b)

Where |Δ| is tiny, an annotator says "tie" one time in two. `chosen` is the text that most of the three prefer.

Both completions of a pair come from the prior. Texts that the prior seldom writes are seldom or never judged, so a
reward model trained on these pairs must guess there, and a policy that moves away from the prior exploits the guess.
"""

import argparse
import gzip
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.toy import model_path, preferences_path, prompts
from rlhf_bayes.toy.rewards import sentiment

ERROR_RATES = {"careful": 0.05, "average": 0.2, "careless": 0.45}
TEMPERATURE = 0.2  # τ, in units of sentiment
TIE_WITHIN = 0.1  # sentiment
TIE_PROB = 0.5
PAIRS_A_PROMPT = {"train": 94, "test": 19}  # 3,008 and 608 in all
MAX_COMPLETION_LENGTH = 32


class Pair(NamedTuple):
    """Two different completions of one prompt, in the order in which they were drawn."""

    prompt: str
    a: str
    b: str


def vote_prob(delta: float, error_rate: float) -> float:
    """Probability that an annotator who does not say "tie" votes for a; `delta` = g(a) − g(b)."""
    right = 1 / (1 + math.exp(-delta / TEMPERATURE))
    return (1 - error_rate) * right + error_rate * (1 - right)


def judge(pair: Pair, rng: random.Random) -> dict[str, Any]:
    """The row of a dataset: the pair as most of the three prefer it (at random after a draw), and how each voted."""
    delta = sentiment(pair.a) - sentiment(pair.b)
    votes = [_vote(delta, error_rate, rng) for error_rate in ERROR_RATES.values()]
    lead = votes.count("a") - votes.count("b")
    a_is_chosen = rng.random() < 0.5 if lead == 0 else lead > 0
    names = {"a": "chosen", "b": "rejected", "tie": "tie"}
    if not a_is_chosen:
        names |= {"a": "rejected", "b": "chosen"}
    annotator_votes = [names[vote] for vote in votes]
    return {
        "prompt": pair.prompt,
        "chosen": pair.a if a_is_chosen else pair.b,
        "rejected": pair.b if a_is_chosen else pair.a,
        "annotators": list(ERROR_RATES),
        "annotator_votes": annotator_votes,
        "votes": [annotator_votes.count(name) for name in ("chosen", "rejected", "tie")],
    }


def _vote(delta: float, error_rate: float, rng: random.Random) -> str:
    if abs(delta) < TIE_WITHIN and rng.random() < TIE_PROB:
        return "tie"
    return "a" if rng.random() < vote_prob(delta, error_rate) else "b"


def draw_pairs(num_pairs: int, seed: int) -> list[list[Pair]]:
    """
    Pairs of different completions from the bundled model, a list for each bundled prompt.

    A completion occurs in only one pair of its prompt, so no text of a test pair occurs in training.

    Args:
        num_pairs (`int`): pairs of each prompt.
        seed (`int`): the same seed gives the same pairs, on the same build of torch.
    """
    prior = LanguageModel(model_path(), max_completion_length=MAX_COMPLETION_LENGTH, batch_size=256)
    # about one text in forty is a duplicate within its prompt, so more are drawn than needed
    n = 2 * num_pairs + num_pairs // 2 + 8
    drawn = prior.sample(prompts(), n=n, generator=torch.Generator().manual_seed(seed))
    pairs = []
    for start, prompt in zip(range(0, len(drawn), n), prompts(), strict=True):
        texts = [text for text in dict.fromkeys(drawn.texts[start : start + n]) if text.strip()]
        if len(texts) < 2 * num_pairs:
            raise ValueError(
                f"`num_pairs` must leave enough different completions, got {num_pairs}: {n} draws for {prompt!r} gave "
                f"{len(texts)} texts. Ask for fewer pairs."
            )
        pairs.append([Pair(prompt, texts[2 * row], texts[2 * row + 1]) for row in range(num_pairs)])
    return pairs


def make_preferences(pairs_a_prompt: dict[str, int], seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Rows of each split, in random order; `pairs_a_prompt` maps a split to its number of pairs per prompt."""
    rng = random.Random(seed)
    splits = {split: [] for split in pairs_a_prompt}
    for of_prompt in draw_pairs(sum(pairs_a_prompt.values()), seed):
        left = iter(of_prompt)
        for split, count in pairs_a_prompt.items():
            splits[split] += [judge(next(left), rng) for _ in range(count)]
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def write_preferences(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A JSON object a line, compressed; the same rows give the same bytes."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # the header of a gzip file usually holds its time and name; mtime=0 keeps the bytes reproducible
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))


def main() -> None:
    """Write the bundled preferences: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split, rows in make_preferences(PAIRS_A_PROMPT, args.seed).items():
        path = preferences_path(split)
        path.parent.mkdir(exist_ok=True)
        write_preferences(rows, path)
        print(f"{len(rows):,} pairs, {path.stat().st_size:,} bytes: {path}")


if __name__ == "__main__":
    main()
