import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from rlhf_bayes.trainers.checks import check_datasets

CHAT = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Dataset.from_dict({"text": ["a"]}),
            r"`train_dataset` must have a column `prompt`, got \['text'\].*rename_column\('text', 'prompt'\)",
        ),
        (Dataset.from_dict({"prompt": []}), "`train_dataset` must hold at least one prompt, got none"),
        (Dataset.from_dict({}), r"must have a column `prompt`, got \[\]"),
        (Dataset.from_dict({"prompt": ["a", ""]}), "in `prompt`, got '' in row 1"),
        (Dataset.from_dict({"prompt": [1, 2]}), "texts or lists of chat messages in `prompt`, got 1 in row 0"),
        (Dataset.from_dict({"prompt": [["a"]]}), r"got \['a'\] in row 0"),
        (Dataset.from_dict({"prompt": ["a", None]}), "got None in row 1"),
        (Dataset.from_dict({"prompt": [CHAT, []]}), r"got \[\] in row 1"),
        (
            DatasetDict(good=Dataset.from_dict({"prompt": ["a"]}), bad=Dataset.from_dict({"x": ["a"]})),
            r"`train_dataset\['bad'\]` must have a column `prompt`, got \['x'\]",
        ),
        (
            IterableDataset.from_generator(lambda: iter([{"x": 1}])).with_format(None)._resolve_features(),
            r"must have a column `prompt`, got \['x'\]",
        ),
    ],
)
def test_refusals(dataset, message):
    with pytest.raises(ValueError, match=message):
        check_datasets(train_dataset=dataset)


def test_the_argument_is_named():
    with pytest.raises(ValueError, match="`eval_dataset` must hold at least one"):
        check_datasets(
            train_dataset=Dataset.from_dict({"prompt": ["a"]}), eval_dataset=Dataset.from_dict({"prompt": []})
        )


@pytest.mark.parametrize(
    "dataset",
    [
        None,
        Dataset.from_dict({"prompt": ["a"], "solution": [1]}),
        Dataset.from_dict({"prompt": [CHAT, [*CHAT, *CHAT]]}),
        {"one": Dataset.from_dict({"prompt": ["a"]}), "two": None},
        IterableDataset.from_generator(lambda: iter([{"prompt": "a"}])),
    ],
)
def test_what_is_accepted(dataset):
    check_datasets(train_dataset=dataset)
