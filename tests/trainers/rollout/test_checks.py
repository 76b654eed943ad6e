import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from rlhf_bayes import GDCTrainer, PPOConfig, PPOTrainer
from rlhf_bayes.trainers.rollout.checks import check_datasets, check_enough_prompts

from ..training import config, gdc_config

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


@pytest.mark.parametrize("trainer", [PPOTrainer, GDCTrainer])
@pytest.mark.parametrize("name", ["tools", "environment_factory", "rollout_func"])
def test_turns_with_an_environment_are_refused(trainer, name):
    with pytest.raises(TypeError, match=rf"`{name}` is no argument of {trainer.__name__}: .*`policy_mask`"):
        trainer("no such model", lambda **columns: [], **{name: []})


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


def test_a_list_is_no_dataset():
    with pytest.raises(TypeError, match=r"`train_dataset` must be a Dataset .*got list\..*Dataset\.from_list\(rows\)"):
        check_datasets(train_dataset=[{"prompt": "a"}])


@pytest.mark.parametrize("sizes", [{}, {"steps_per_generation": 4, "num_generations": 16}, {"num_generations": 1}])
def test_as_many_rows_as_a_rollout_has_prompts(tmp_path, sizes):
    args = config(tmp_path, PPOConfig, **sizes)
    prompts = 24 * sizes.get("steps_per_generation", 1) // args.num_generations
    enough = Dataset.from_dict({"prompt": ["a"] * prompts})
    check_enough_prompts(args, enough)
    check_enough_prompts(args, enough.select([0]).to_iterable_dataset())
    check_enough_prompts(args, None)
    with pytest.raises(ValueError, match=rf"`train_dataset` must hold at least {prompts} rows, got {prompts - 1}: "):
        check_enough_prompts(args, enough.select(range(prompts - 1)))


@pytest.mark.parametrize("kind", ["ppo", "gdc"])
def test_too_few_rows_are_refused_before_the_model_is_loaded(tmp_path, kind):
    two = Dataset.from_dict({"prompt": ["a", "b"]})
    trainer_class, args = (PPOTrainer, config(tmp_path)) if kind == "ppo" else (GDCTrainer, gdc_config(tmp_path))
    with pytest.raises(ValueError, match=r"at least 3 rows, got 2: .*concatenate_datasets\(\[train_dataset\] \* 2\)"):
        trainer_class("no/such/model", lambda **kwargs: [], args, train_dataset=two)
