"""Functions and rewards by name."""

import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_bayes import LanguageModel, PPOConfig, toy
from rlhf_bayes.commands.flags import load_language_model, load_likelihood, load_pooled_reward, load_reward_func
from rlhf_bayes.rewards import RewardEnsemble, RewardModel
from rlhf_bayes.testing import EnumerableLM
from rlhf_bayes.toy.rewards import sentiment_reward


def test_reward_functions(tmp_path, monkeypatch):
    assert load_reward_func("rlhf_bayes.toy.rewards:sentiment_reward") is sentiment_reward
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_of_test_cli.py").write_text(
        "def one(completions, **columns):\n    return [1.0]\nnumber = 3\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_reward_func("rewards_of_test_cli:one")([]) == [1.0]
    with pytest.raises(ValueError, match=r"got 'number'. It has \['one'\]"):
        load_reward_func("rewards_of_test_cli:number")


EVIDENCE = """
import torch

class Own:
    def __init__(self, nats=1.0):
        self.nats = nats

    def log_likelihood(self, prompts, completions, completion_ids, columns=None):
        return torch.full((len(prompts),), self.nats)

instance = Own(2.0)

def made():
    return Own(3.0)

def reward(prompts, completions, **columns):
    return [0.0] * len(prompts)

def nothing():
    return 4.0

def a_class():
    return Own

number = 5
"""


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "evidence_of_test_named.py").write_text(EVIDENCE)
    return "evidence_of_test_named"


def test_a_likelihood_is_an_object_or_what_makes_one(evidence):
    nats = {
        name: load_likelihood(f"{evidence}:{name}").log_likelihood(["a"], ["b"], [[0]]).item()
        for name in ("instance", "made", "Own")
    }
    assert nats == {"instance": 2.0, "made": 3.0, "Own": 1.0}
    assert load_likelihood(f"{evidence}:instance") is sys.modules[evidence].instance


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}", r"`likelihood` must have the form `module:object`, .*evidence:my_likelihood"),
        ("no_such_module:likelihood", "`likelihood` must name a module that can be imported"),
        ("{}:instant", "must name a likelihood of .*Is 'instance' meant"),
        ("{}:number", r"must name a likelihood of .*got 'number'"),
        ("{}:reward", "what makes one without arguments, .*missing a required .*`--reward_func`"),
        ("{}:nothing", "which made a float"),
        ("{}:a_class", "which made a type"),
    ],
)
def test_what_is_no_likelihood_is_refused(evidence, name, message):
    with pytest.raises(ValueError, match=message):
        load_likelihood(name.format(evidence))


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """An ensemble of three random heads, on disk."""
    folder = tmp_path_factory.mktemp("rewards") / "heads"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(toy.model_path(), num_labels=3)
    RewardEnsemble(model, AutoTokenizer.from_pretrained(toy.model_path())).save_pretrained(folder)
    return str(folder)


def test_pooled_reward_is_centered_on_the_prior(heads):
    prior = LanguageModel(toy.model_path(), max_completion_length=6)
    texts = [" was good.", " was bad."]
    pooled = load_pooled_reward(heads, "min", prior, ["The movie"], beta=0.1, num_samples=8, seed=3)
    drawn = prior.sample(["The movie"], n=8, generator=torch.Generator().manual_seed(3))
    ensemble = RewardEnsemble.from_pretrained(heads)
    members = ensemble.member_rewards(["The movie"] * 2, texts)  # (K, 2)
    means = ensemble.member_rewards(drawn.prompts, drawn.texts).mean(1, keepdim=True)  # (K, 1)
    expected = (members - means).amin(0) + means.mean()
    torch.testing.assert_close(torch.tensor(pooled(["The movie"] * 2, texts)), expected)


def test_pooled_reward_of_the_mean_needs_no_draws(heads):
    prior = LanguageModel(toy.model_path())
    reward = load_pooled_reward(heads, "mean", prior, [], beta=0.1)
    assert isinstance(reward, RewardEnsemble)
    with pytest.raises(ValueError, match="`penalty` must be left out with the rule 'mean'"):
        load_pooled_reward(heads, "mean", prior, [], penalty=1.0)


def test_a_single_model_has_nothing_to_pool(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(toy.model_path(), num_labels=1)
    RewardModel(model, AutoTokenizer.from_pretrained(toy.model_path())).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`reward_rule` must be 'mean' for a single reward model"):
        load_pooled_reward(str(tmp_path), "pessimistic", LanguageModel(toy.model_path()), ["I"], beta=0.1)


def test_tables_of_recipes_read_the_trainers_prompts(tmp_path):
    toy_lm = EnumerableLM(vocab_size=4, max_completion_length=3)
    toy_lm.tokenizer.chat_template = "{{ messages[0]['content'] }}{% if thinking %} b{% endif %}"
    folder = toy_lm.save(tmp_path / "model")
    kwargs = {"chat_template_kwargs": {"thinking": True}, "max_completion_length": 3, "use_cpu": True, "bf16": False}
    lm = load_language_model(folder, PPOConfig(str(tmp_path), **kwargs))
    chat = [{"role": "user", "content": "a"}]
    assert lm.prompt_token_ids([chat]) == [toy_lm.tokenizer("a b")["input_ids"]]
