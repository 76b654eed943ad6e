"""
Two sets of real preferences, read from files, on which `reward_methods.py` compares methods.

- `ukp`: UKPConvArg1 (Habernal & Gurevych 2016, CC BY 4.0), `<folder>/ukp_convarg1/{arguments,pairs}.jsonl.gz`. 4 or 5
  crowd workers per pair say which of two arguments for one stance is more convincing, on 32 topics in 16 discussions.
  The prompt is the discussion's title and the stance. Whole discussions are held out, with both stances.
- `hh`: harmless-base test split of Anthropic's HH (Bai et al. 2022, MIT), `<folder>/hh_rlhf/pairs.jsonl.gz`, with one
  judgement per pair. All dialogues with the same opening are held out together.

A row has `prompt`, `chosen`, `rejected`, `group` (rows of a group are held out together) and, for `ukp`, `votes`
(chosen, rejected, tie), `chosen_prob`, `annotators` and `annotator_votes`. `chosen` is the text that most voted for;
after a tie it is the first one.
"""

import gzip
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
VOTES = ("chosen", "rejected", "tie")
OPPOSITE = {"chosen": "rejected", "rejected": "chosen", "tie": "tie"}


def read_lines(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load_ukp(folder: Path) -> list[Row]:
    arguments = {row["id"]: row for row in read_lines(folder / "ukp_convarg1" / "arguments.jsonl.gz")}
    pairs = read_lines(folder / "ukp_convarg1" / "pairs.jsonl.gz")
    return [ukp_row(pair, arguments[pair["a1"]], arguments[pair["a2"]]) for pair in pairs]


def ukp_row(pair: Row, first: Row, second: Row) -> Row:
    names = {"a1": "chosen", "a2": "rejected", "equal": "tie"}
    votes = [names[vote] for _, vote, _ in pair["votes"]]
    chosen, rejected = first["text"], second["text"]
    if votes.count("rejected") > votes.count("chosen"):
        chosen, rejected, votes = rejected, chosen, [OPPOSITE[vote] for vote in votes]
    counts = Counter(votes)
    return {
        "prompt": f"{pair['title']} {first['stance']}\n",
        "chosen": chosen,
        "rejected": rejected,
        "group": pair["title"],
        "votes": [counts[name] for name in VOTES],
        "chosen_prob": (counts["chosen"] + counts["tie"] / 2) / len(votes),
        "annotators": [str(worker) for worker, _, _ in pair["votes"]],
        "annotator_votes": votes,
    }


def load_hh(folder: Path) -> list[Row]:
    """Rows of `hh`. The group of a row is the human's first turn, which several dialogues may share."""
    pairs = read_lines(folder / "hh_rlhf" / "pairs.jsonl.gz")
    return [pair | {"group": pair["prompt"].split("\n\nAssistant:")[0]} for pair in pairs]


def fitted(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """
    Rows whose longer text fits into `max_length` tokens, if need be without the beginning of the prompt.

    Rows whose prompt would be cut to less than a quarter of `max_length` are left out.
    """
    ids = {
        text: tokenizer(text)["input_ids"] for row in rows for text in (row["prompt"], row["chosen"], row["rejected"])
    }
    result = []
    for row in rows:
        prompt = ids[row["prompt"]]
        # − 2: an EOS is appended, and the join of two texts may need one token more
        room = max_length - max(len(ids[row["chosen"]]), len(ids[row["rejected"]])) - 2
        if len(prompt) <= room:
            result.append(row)
        elif room >= max_length // 4:
            end = tokenizer.decode(prompt[len(prompt) - room :], skip_special_tokens=True)
            result.append(row | {"prompt": end})
    return result


@dataclass(frozen=True)
class Pairs:
    """Pairs to train on, and pairs to evaluate on."""

    train: list[Row]
    test: list[Row]

    @property
    def target(self) -> Tensor:
        """Share of votes for `chosen` among the held-out pairs: (N,)."""
        return torch.tensor([row.get("chosen_prob", 1.0) for row in self.test], dtype=torch.float64)

    @property
    def votes(self) -> Tensor | None:
        """Counts of the votes on the held-out pairs: (N, 3)."""
        return torch.tensor([row["votes"] for row in self.test]) if "votes" in self.test[0] else None


def split(
    rows: list[Row], seed: int, share: float, train_pairs: int | None = None, test_pairs: int | None = None
) -> Pairs:
    """
    Train and test rows without a common group, each reduced to a random subset of the given size.

    Groups are drawn for the test until they hold at least `share` of the rows.
    """
    generator = random.Random(seed)
    sizes = Counter(row["group"] for row in rows)
    groups = sorted(sizes)
    generator.shuffle(groups)
    held_out: set[str] = set()
    while sum(sizes[group] for group in held_out) < share * len(rows):
        held_out.add(groups[len(held_out)])
    train = [row for row in rows if row["group"] not in held_out]
    test = [row for row in rows if row["group"] in held_out]
    generator.shuffle(train)
    generator.shuffle(test)
    return Pairs(train[:train_pairs], test[:test_pairs])


def in_batches_of_like_length(rows: list[Row], batch: int, seed: int) -> list[Row]:
    """Rows in an order that needs little padding: sorted within chunks of 20 batches, with the batches shuffled."""
    generator = random.Random(seed)
    rows = generator.sample(rows, len(rows))
    chunks = [rows[start : start + 20 * batch] for start in range(0, len(rows), 20 * batch)]
    batches = []
    for chunk in chunks:
        chunk.sort(key=lambda row: len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])))
        batches += [chunk[start : start + batch] for start in range(0, len(chunk), batch)]
    # a batch that is not full goes last: otherwise all batches after it would be shifted
    full = [rows for rows in batches if len(rows) == batch]
    generator.shuffle(full)
    return [row for rows in [*full, *(rows for rows in batches if len(rows) < batch)] for row in rows]
