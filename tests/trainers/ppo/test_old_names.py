"""Scripts of TRL's former PPO: errors name what took the place of each argument, and the tables suffice to migrate."""

import inspect
import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rlhf_bayes import PPOConfig, PPOTrainer, toy
from rlhf_bayes.commands.flags.recipe import parse_flags
from rlhf_bayes.lm.pretrained import load_causal_lm
from rlhf_bayes.trainers.ppo.old_names import OLD_ARGUMENTS, OLD_FIELDS, OLD_METHODS, OTHER_DEFAULTS

from ..training import QUIET, config, prompts_of, trainer

PAGE = Path(__file__).parents[3] / "docs" / "migration.md"


def table(title):
    """The rows below a heading of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `.*$", section, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("title", "old"),
    [
        ("Fields of `PPOConfig`", OLD_FIELDS),
        ("Arguments of `PPOTrainer`", OLD_ARGUMENTS),
        ("Methods of `PPOTrainer`", OLD_METHODS),
    ],
)
def test_the_page_has_every_old_name(title, old):
    assert table(title) == [f"| `{name}` | {successor.text} |" for name, successor in old.items()]


def test_the_page_has_the_defaults_of_before_and_of_now():
    fields = PPOConfig.__dataclass_fields__
    assert table("Other defaults") == [
        f"| `{name}` | {before!r} | {fields[name].default!r} | {remark} |"
        for name, (before, remark) in OTHER_DEFAULTS.items()
    ]
    assert all(fields[name].default != before for name, (before, _) in OTHER_DEFAULTS.items())


def test_successors_exist():
    arguments = set(inspect.signature(PPOTrainer).parameters)
    known = set(PPOConfig.__dataclass_fields__) | arguments
    for old in (OLD_FIELDS, OLD_ARGUMENTS):
        assert {successor.name for successor in old.values() if successor.name is not None} <= known
        assert not old.keys() & (set(PPOConfig.__dataclass_fields__) if old is OLD_FIELDS else arguments)


@pytest.mark.parametrize("name", OLD_FIELDS)
def test_an_old_field_is_refused_with_its_successor(name, tmp_path):
    with pytest.raises(TypeError, match=f"`{name}` is no field of PPOConfig, but of TRL's former PPO.") as error:
        PPOConfig(str(tmp_path), **{name: 1})
    successor = OLD_FIELDS[name]
    assert (successor.name or "eave it out") in str(error.value)


@pytest.mark.parametrize("name", OLD_ARGUMENTS)
def test_an_old_argument_is_refused_with_its_successor(name):
    with pytest.raises(TypeError, match=f"`{name}` is no argument of PPOTrainer"):
        PPOTrainer("model", **{name: None})


def test_unknown_names_are_still_pythons_errors(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'kl_coeff'"):
        PPOConfig(str(tmp_path), kl_coeff=1.0)


def test_old_methods_and_tokenised_prompts(toy, tmp_path):
    trained = trainer(toy, config(tmp_path))
    with pytest.raises(AttributeError, match="`generate_completions` is no method of PPOTrainer"):
        trained.generate_completions()
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        _ = trained.no_such_thing
    tokenised = prompts_of(toy).map(lambda row: {"input_ids": [1]}, remove_columns=["prompt"])
    with pytest.raises(ValueError, match=r"must have a column `prompt`, got \['input_ids'\]\. Prompts are texts"):
        trainer(toy, config(tmp_path), train_dataset=tokenised)


def test_old_flags_of_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ppo_klrl.py", "--kl_coef", "0.1", "--response-length=5"])
    with pytest.raises(ValueError, match=r"`--kl_coef` is no flag.*`beta`.*`--response_length` is no flag.*`max_comp"):
        parse_flags((PPOConfig,), {}, {})


def old_script(tokenizer, tmp_path):
    """The arguments of a script of TRL 1.12, as its `ppo.py` has them."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    LlamaForSequenceClassification(shape).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    reward_model = LlamaForSequenceClassification.from_pretrained(tmp_path / "reward")
    fields = {
        "total_episodes": 32, "num_ppo_epochs": 2, "num_mini_batches": 1, "response_length": 12, "kl_coef": 0.25,
        "cliprange": 0.2, "local_rollout_forward_batch_size": 16, "stop_token": "eos", "whiten_rewards": False,
        "missing_eos_penalty": 1.0, "gamma": 1.0, "lam": 0.95, "per_device_train_batch_size": 16,
    }  # fmt: skip
    arguments = {
        "model": load_causal_lm(toy.model_path()), "reward_model": reward_model, "processing_class": tokenizer,
        "train_dataset": Dataset.from_dict({"prompt": toy.prompts()[:32]}), "data_collator": None,
    }  # fmt: skip
    return {"output_dir": str(tmp_path), **QUIET, **fields}, arguments


def migrated(given, old):
    """Rename what the table says keeps its value, and leave out what it says to leave out."""
    kept = {}
    for name, value in given.items():
        successor = old.get(name)
        if successor is None:
            kept[name] = value
        elif successor.same_value:
            kept[successor.name] = value
    return kept


def test_a_script_migrated_by_the_tables_alone_runs(tmp_path):
    fields, arguments = old_script(AutoTokenizer.from_pretrained(toy.model_path()), tmp_path)
    new = migrated(fields, OLD_FIELDS)
    # the one that needs a computation, as its row has it: 2 × 32 / 16
    new["max_steps"] = new["num_iterations"] * fields["total_episodes"] // new["per_device_train_batch_size"]
    trained = PPOTrainer(args=PPOConfig(**new, num_generations=1), **migrated(arguments, OLD_ARGUMENTS))
    trained.train()
    assert trained.state.global_step == 4
    assert trained.state.num_input_tokens_seen > 0
    assert trained.beta == 0.25
    trained.save_model(str(tmp_path))
    # 32 episodes: two rollouts of 16 completions
    assert len([entry for entry in trained.state.log_history if "posterior/elbo" in entry]) <= 2


def test_the_diff_of_the_page_is_the_same_migration():
    diff = PAGE.read_text(encoding="utf-8").split("```diff\n")[1].split("```")[0]
    before, after = (
        dict(re.findall(rf"^{sign} +(\w+)=(.*),$", diff, flags=re.MULTILINE)) for sign in (re.escape("-"), r"\+")
    )
    expected = migrated(before, {**OLD_FIELDS, **OLD_ARGUMENTS})
    for optional in ("ref_model", "value_model"):
        expected.pop(optional)
    assert after == expected | {"max_steps": "4"}
