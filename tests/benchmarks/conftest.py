"""Fixtures that tests of several benchmarks share."""

import gzip
import json

import pytest


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Both sets of preferences, with made-up rows in the form of the real ones: the longer text wins."""
    folder = tmp_path_factory.mktemp("preferences")
    arguments, pairs, dialogues = [], [], []
    for topic in range(6):
        texts = ["the film was " + "very " * n + "good" for n in (0, 2, 5, 9)]
        ids = [f"topic{topic}/arg{n}" for n in range(4)]
        arguments += [{"id": i, "stance": "Yes", "text": text} for i, text in zip(ids, texts, strict=True)]
        for first, second in ((0, 1), (3, 1), (2, 0), (1, 2), (0, 3), (2, 3)):
            better = "a1" if first > second else "a2"
            votes = [[7, better, 0.3], [8, better, 0.5], [9, "equal", 0.1], [topic, "a1", 0.4]]
            pairs.append({"topic": f"t{topic}", "title": f"Film {topic}", "a1": ids[first], "a2": ids[second]})
            pairs[-1] |= {"gold": better, "votes": votes}
            dialogue = {"prompt": f"\n\nHuman: film {topic}?\n\nAssistant:", "chosen": " " + texts[max(first, second)]}
            dialogues.append(dialogue | {"rejected": " " + texts[min(first, second)]})
    write(folder / "ukp_convarg1" / "arguments.jsonl.gz", arguments)
    write(folder / "ukp_convarg1" / "pairs.jsonl.gz", pairs)
    write(folder / "hh_rlhf" / "pairs.jsonl.gz", dialogues)
    return folder
