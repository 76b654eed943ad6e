"""What a first run needs: a tiny language model of one-sentence reviews, prompts, a reward and preferences."""

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def model_path() -> str:
    """Folder of the bundled model and its tokenizer, for `from_pretrained`; written by `rlhf_bayes.toy.train_lm`."""
    return str(Path(__file__).parent / "model")


def prompts() -> list[str]:
    """Openings of reviews, which are neither positive nor negative."""
    return list(PROMPTS)


def preferences(split: str = "train") -> "Dataset":
    """
    Pairs of completions of the bundled prompts, each judged by three simulated annotators of different reliability.

    Columns: `prompt`, `chosen`, `rejected` (texts; completions begin with a space), `annotators` (names, three a row),
    `annotator_votes` ("chosen", "rejected" or "tie", in the same order), `votes` (counts of these three). `chosen` has
    at least as many votes as `rejected`. The gold reward behind the votes is `rlhf_bayes.toy.rewards.sentiment`.

    Args:
        split (`str`, defaults to `"train"`): `"train"` (3,008 pairs) or `"test"` (608 other pairs, same prompts).

    Written by `rlhf_bayes.toy.annotate`, which says how the annotators vote.
    """
    from datasets import Dataset

    with gzip.open(preferences_path(split), "rt", encoding="utf-8") as file:
        return Dataset.from_list([json.loads(line) for line in file])


def preferences_path(split: str = "train") -> Path:
    """
    File of the bundled preferences, compressed JSON lines.

    Raises:
        ValueError: if `split` is neither `"train"` nor `"test"`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    return Path(__file__).parent / "preferences" / f"{split}.jsonl.gz"


PROMPTS = (
    "The movie",
    "I thought the food",
    "The hotel",
    "Honestly, the book",
    "The phone",
    "We thought the museum",
    "The concert was",
    "My parents",
    "To my surprise, the soup",
    "The waiter",
    "After a long week, the yoga class",
    "The plot was",
    "I think the guide",
    "On a rainy Sunday, the zoo",
    "The camera",
    "For our anniversary, we",
    "The restaurant was",
    "Overall, the breakfast",
    "My sister and I",
    "The album",
    "Last summer, the campsite",
    "The assistant",
    "My friends said the sequel",
    "The fries were",
    "In the end, the laptop",
    "I",
    "The view",
    "This time, the garage",
    "My wife thought the novel",
    "The band",
    "To be fair, the coffee",
    "Our guests",
)
