"""The recipe as a user launches it, in processes of its own, with few steps; and what wrong flags end in."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_bayes import toy
from rlhf_bayes.commands import train_ppo
from rlhf_bayes.commands.flags import load_likelihood
from rlhf_bayes.report import read_runs, write_report
from rlhf_bayes.rewards import PooledReward, RewardEnsemble, RewardModel
from rlhf_bayes.toy.rewards import sentiment_reward

from ..scripts import run_script

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "ppo_klrl.py"
SHARED = ROOT.parent / "shared"
FEW = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--num_generations", "4", "--report_prompts", "2"]
SMALL = [*FEW, "--report_samples", "32", "--max_completion_length", "24"]


@pytest.fixture(scope="module")
def recipe():
    """What the recipe runs."""
    return train_ppo


@pytest.mark.processes
def test_without_arguments_trains_the_bundled_model(tmp_path):
    accelerate = (sys.executable, "-m", "accelerate.commands.launch")
    output = run_script(RECIPE, *FEW, "--report_samples", 32, cwd=tmp_path, launcher=accelerate)
    for expected in (
        "Samples",
        "The movie",
        "prior (before)",
        "policy (after)",
        "distinct-2",
        "entropy",
        "draws each",
    ):
        assert expected in output
    for quantity in ("reward", "KL to prior", "ELBO", "log Z", "gap"):
        assert f"│ {quantity}" in output
    folder = tmp_path / "runs" / "ppo_klrl"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert_reported(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    prior = AutoModelForCausalLM.from_pretrained(toy.model_path())
    assert any((after != before).any() for after, before in zip(policy.parameters(), prior.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"


def assert_reported(folder):
    """The folder alone makes a page with curves, samples of before and after, distances and settings."""
    (run,) = read_runs([folder])
    assert run.curve("posterior/elbo")[0] == [1, 2]
    assert (run.beta, run.reward_names) == (0.25, ["sentiment_reward"])
    assert len(run.samples) == len(run.before) == 2 * 32
    assert [row["beta"] for row in run.sampling["what_if"]] == [2.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert [row["n"] for row in run.sampling["best_of_n"]] == [1, 2, 4, 8, 16, 32]
    before = sum(sample.scores["reward"] for sample in run.before) / len(run.before)
    assert run.sampling["best_of_n"][0]["reward"] == pytest.approx(before, abs=1e-5)
    assert run.settings["class"] == "PPOConfig"
    page = write_report([folder], folder / "report").read_text(encoding="utf-8")
    for title in ("ELBO under its ceiling", "Reward against the distance", "How far from", "What if", "Samples"):
        assert title in page


def test_own_prompts_rewards_and_lora_from_yaml(run_in_process, tmp_path, capsys):
    rows = [{"question": "The hotel", "bonus": 1.0}, {"question": "I thought the soup", "bonus": 2.0}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(
        "def length(completions, bonus, **columns):\n"
        "    return [b * len(text) / 100 for text, b in zip(completions, bonus, strict=True)]\n"
    )
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {toy.model_path()}\ndataset_name: prompts.jsonl\nprompt_column: question\n"
        "output_dir: out\nlearning_rate: 1.0e-3\nuse_peft: true\nlora_r: 4\n"
    )
    rewards = ["--reward_func", "my_rewards:length", "--reward_func", "rlhf_bayes.toy.rewards:sentiment_reward"]
    run_in_process("--config", "run.yaml", *rewards, *SMALL)
    assert "I thought the soup" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "curves.png").exists()


def test_towards_a_likelihood(run_in_process, evidence, tmp_path, capsys):
    run_in_process("--likelihood", f"{evidence}:kind", "--output_dir", "out", *SMALL)
    output = capsys.readouterr().out
    assert "Distance to the posterior π0·exp(log-likelihood)/Z" in output
    assert "│ ELBO" in output
    assert re.search(r"│ reward +│ +– │ +– │", output)  # all of it is in nats
    (run,) = read_runs([tmp_path / "out"])
    assert (run.beta, run.reward_names) == (None, [])
    # training and report are about the same likelihood: r/β of the completions before is the policy's evidence
    likelihood = load_likelihood(f"{evidence}:kind")
    rewards = sentiment_reward([sample.completion for sample in run.before])
    elbo = json.loads((tmp_path / "out" / "evaluation.json").read_text())["prior"]["elbo"]["mean"]
    assert likelihood.beta == 0.5
    assert elbo == pytest.approx(sum(rewards) / len(rewards) / 0.5, abs=0.01)  # of the prior, E[r/β]; by a jackknife
    first = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]
    assert first["posterior/elbo"] == pytest.approx(first["rewards/log_likelihood/mean"], rel=1e-4)  # β is 1


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("kind", ["--reward_func", "rlhf_bayes.toy.rewards:vader_reward"], "`--reward_func` must be left out with"),
        ("kind", ["--reward_model_path", "runs/x"], "`--reward_model_path` must be left out with `--likelihood`"),
        ("kind", ["--beta", "0.3"], r"`beta` must be left out with `likelihood`, got 0\.3"),
        ("kind", ["--target_kl", "3"], "`target_kl` must be left out with `likelihood`"),
        ("but", [], "`likelihood` must not forbid completions with PPO"),
        ("kind_but", [], "must not forbid completions with PPO.* got ProductLikelihood"),
        ("butt", [], "Is 'but' meant"),
    ],
)
def test_likelihoods_that_are_refused(recipe, run_in_process, evidence, monkeypatch, name, flags, message):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        run_in_process("--likelihood", f"{evidence}:{name}", *flags, *SMALL)


def test_without_a_kl_term_there_is_no_posterior_to_report(run_in_process, capsys):
    run_in_process("--beta", 0, "--output_dir", "out", *SMALL)
    output = capsys.readouterr().out
    assert "no posterior" in output
    (row,) = (line for line in output.splitlines() if "ELBO" in line)
    assert row.count("–") == 2
    (run,) = read_runs(["out"])
    assert run.beta is None
    assert "policy/elbo" not in run.estimates
    assert (run.sampling["what_if"], len(run.sampling["best_of_n"])) == ([], 6)


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    """A random model, and a random ensemble of two heads, on disk."""
    folder = tmp_path_factory.mktemp("rewards")
    tokenizer = AutoTokenizer.from_pretrained(toy.model_path())
    for name, num_labels in (("one", 1), ("two", 2)):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(toy.model_path(), num_labels=num_labels)
        (RewardModel if num_labels == 1 else RewardEnsemble)(model, tokenizer).save_pretrained(folder / name)
    return folder


def test_against_an_ensemble_pooled_with_caution(recipe, run_in_process, reward_models, monkeypatch, tmp_path, capsys):
    trained_on = []

    def trainer(reward_funcs, **arguments):
        trained_on.extend(reward_funcs)
        return train(reward_funcs=reward_funcs, **arguments)

    train = recipe.PPOTrainer
    monkeypatch.setattr(recipe, "PPOTrainer", trainer)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The hotel"}\n{"prompt": "The soup"}\n')
    rule = ["--reward_model_path", reward_models / "two", "--reward_rule", "mean_minus_variance"]
    flags = ["--reward_penalty", 0.5, "--dataset_name", "prompts.jsonl", "--output_dir", "out"]
    run_in_process(*rule, *flags, "--reward_func", "rlhf_bayes.toy.rewards:sentiment_reward", *SMALL)
    assert "policy (after)" in capsys.readouterr().out
    _, pooled = trained_on
    assert isinstance(pooled, PooledReward)
    assert (pooled.rule, pooled.penalty, len(pooled.centers)) == ("mean_minus_variance", 0.5, 2)


def test_against_the_mean_of_an_ensemble(run_in_process, reward_models, capsys):
    run_in_process("--reward_model_path", reward_models / "two", "--output_dir", "out", *SMALL)
    assert "policy (after)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("one", ["--reward_rule", "pessimistic"], "`reward_rule` must be 'mean' for a single reward model"),
        ("two", ["--reward_penalty", 1], "`penalty` must be left out with the rule 'mean'"),
        ("two", ["--reward_rule", "pessimistic", "--beta", 0], "`beta` must be positive"),
    ],
)
def test_rules_that_do_not_fit(recipe, run_in_process, reward_models, monkeypatch, name, flags, message):
    monkeypatch.setattr(recipe, "PPOTrainer", lambda **arguments: pytest.fail("a model would be loaded"))
    with pytest.raises(ValueError, match=message):
        run_in_process("--reward_model_path", reward_models / name, *flags, "--output_dir", "out")


@pytest.mark.processes
@pytest.mark.skipif(not SHARED.is_dir(), reason="the model stories260K and its prompts are not beside the project")
def test_stories_with_vader(tmp_path):
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed (extra `recipes`)")
    output = run_script(
        RECIPE,
        *("--model_name_or_path", SHARED / "models" / "stories260K"),
        *("--dataset_name", SHARED / "data" / "tinystories" / "first_sentences.jsonl.gz"),
        *("--prompt_column", "text", "--max_prompts", 20, "--reward_func", "rlhf_bayes.toy.rewards:vader_reward"),
        *("--learning_rate", 1e-4, "--beta", 0.2, "--output_dir", tmp_path / "out", *SMALL),
        cwd=tmp_path,
    )
    assert "policy (after)" in output
    assert (tmp_path / "out" / "curves.png").exists()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (
            ["--dataset_name", "nowhere.jsonl"],
            FileNotFoundError,
            "`dataset_name` must be a file or folder that exists",
        ),
        (["--dataset_name", "rows.xyz"], ValueError, "must end in one of"),
        (
            ["--dataset_name", "rows.jsonl"],
            ValueError,
            r"must be one of the columns of `dataset_name`, \['text'\], got",
        ),
        (
            ["--dataset_name", "rows.jsonl", "--prompt_column", "text", "--max_prompts", 0],
            ValueError,
            "at least 1, got 0",
        ),
        (["--reward_func", "no_colon"], ValueError, "must have the form `module:function`, got 'no_colon'"),
        (["--reward_func", "no_such_module:f"], ValueError, "a module that can be imported, got 'no_such_module:f'"),
        (
            ["--reward_func", "rlhf_bayes.toy.rewards:sentiment_rewards"],
            ValueError,
            "got 'sentiment_rewards'. Is 'sentiment_reward' meant?",
        ),
        (["--model_name_or_path", "some/model"], ValueError, "`--dataset_name` must be given"),
        (["--model_name_or_path", "some/model", "--dataset_name", "rows.jsonl"], ValueError, "`--reward_func"),
        (["--beta", -1], ValueError, "`beta` must be at least 0"),
        (["--reward_rule", "min"], ValueError, "`--reward_model_path` must be given with `--reward_rule`"),
    ],
)
def test_wrong_flags_end_before_the_model_is_loaded(
    recipe, run_in_process, monkeypatch, tmp_path, flags, error, message
):
    monkeypatch.setattr(recipe, "PPOTrainer", lambda **arguments: pytest.fail("a model would be loaded"))
    (tmp_path / "rows.jsonl").write_text('{"text": "The movie"}\n')
    (tmp_path / "rows.xyz").write_text("")
    with pytest.raises(error, match=message):
        run_in_process(*flags, "--output_dir", "out")


def test_the_bundled_model_has_defaults_of_its_own(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo_klrl.py", "--num_generations", "16"])
    args, training_args, model_args = recipe.parse_arguments()
    assert model_args.model_name_or_path == toy.model_path()
    assert (training_args.num_generations, training_args.max_completion_length) == (16, 32)
    assert training_args.use_cpu != recipe.torch.cuda.is_available()

    own = ["--model_name_or_path", "a/b", "--dataset_name", "c/d", "--reward_func", "e:f", "--reward_func", "g:h"]
    monkeypatch.setattr(sys, "argv", ["ppo_klrl.py", *own])
    args, training_args, model_args = recipe.parse_arguments()
    assert args.reward_func == ["e:f", "g:h"]
    assert training_args.learning_rate == recipe.PPOConfig("x", bf16=False, use_cpu=True).learning_rate


def test_a_run_of_trackio_has_a_name_by_which_the_evaluation_finds_it(recipe):
    _, training_args, _ = recipe.parse_arguments(["--report_to", "trackio", "--output_dir", "runs/mine"])
    assert re.fullmatch(r"mine-\d{8}-\d{6}", training_args.run_name)
    _, training_args, _ = recipe.parse_arguments(["--report_to", "trackio", "--run_name", "own"])
    assert training_args.run_name == "own"
    _, training_args, _ = recipe.parse_arguments(["--report_to", "wandb", "tensorboard"])
    assert (training_args.report_to, training_args.run_name) == (["wandb", "tensorboard"], None)


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(recipe, run_in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "PPOTrainer", lambda **arguments: pytest.fail("a model would be loaded"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="`--output_dir` must not hold another run, got 'out'"):
        run_in_process("--output_dir", "out")
