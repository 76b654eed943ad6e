"""What GDCTrainer takes as evidence, what it refuses before a model is loaded, and what reaches a likelihood."""

import math

import pytest
import torch
from datasets import Dataset

from rlhf_bayes import GDCTrainer, PPOConfig
from rlhf_bayes.likelihoods import Constraint, MomentLikelihood, ProductLikelihood, RewardLikelihood
from rlhf_bayes.testing import toy_reward
from rlhf_bayes.trainers.rollout.evidence import beta_of
from rlhf_bayes.trainers.rollout.reward_funcs import LikelihoodReward

from ..training import config, gdc_config, logged, prompts_of, trainer, weights

pytestmark = pytest.mark.slow


def no_a(completion_ids, **kwargs):
    return [0 not in ids for ids in completion_ids]


def length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


FORBIDS = {
    "a condition": Constraint(no_a),
    "in a product": ProductLikelihood([RewardLikelihood(toy_reward, 0.5), Constraint(no_a)]),
    "a limit": MomentLikelihood({"no_a": no_a}, {"no_a": math.inf}, {"no_a": (0, 1)}),
    "the other limit, nested": ProductLikelihood(
        [ProductLikelihood([MomentLikelihood({"f": no_a}, {"f": -math.inf})])]
    ),
}
CONDITION = {"likelihood": Constraint(no_a)}
# name: changes of the configuration, arguments, error, message
REFUSED = {
    "neither": ({}, {}, ValueError, "One of `reward_funcs` and `likelihood` must be given, got neither"),
    "both": ({}, {"reward_funcs": length} | CONDITION, ValueError, r"got both\. .*posterior\.tilt"),
    "a function": ({}, {"likelihood": no_a}, TypeError, "`likelihood` must be an object with a method .*got function"),
    "no function": ({}, {"reward_funcs": []}, ValueError, "`reward_funcs` must hold at least one reward function"),
    "beta": ({"beta": 0.5}, CONDITION, ValueError, r"`beta` must be left out with `likelihood`, got 0\.5"),
    "weights": ({"reward_weights": [1.0]}, CONDITION, ValueError, "`reward_weights` must be left out"),
    "a clip": ({"reward_clip_range": (-1.0, 1.0)}, CONDITION, ValueError, "`reward_clip_range` must be left out"),
    "an eos penalty": ({"missing_eos_penalty": 1.0}, CONDITION, ValueError, "`missing_eos_penalty` must be left out"),
    "annealing downwards": (
        {"beta": 0.5, "beta_init": 0.4},
        {"reward_funcs": length},
        ValueError,
        r"`beta_init` must be above `beta` = 0\.5, got 0\.4",
    ),
    "annealing nats": ({"beta_init": 1.0}, CONDITION, ValueError, r"`beta_init` must be above `beta` = 1\.0"),
    "below the default": ({"beta_init": 0.05}, {"reward_funcs": length}, ValueError, r"above `beta` = 0\.05, got 0"),
    "a dataset": (
        {},
        {"reward_funcs": length, "train_dataset": Dataset.from_dict({"text": ["a"]})},
        ValueError,
        "`train_dataset` must have a column `prompt`",
    ),
    "tokenizers": (
        {},
        {"reward_funcs": ["no/such", length], "reward_processing_classes": [None] * 3},
        ValueError,
        "`reward_processing_classes` must hold one tokenizer for each of the 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_model_is_loaded(toy, tmp_path, name):
    changes, arguments, error, message = REFUSED[name]
    args = gdc_config(tmp_path, **{"beta": None} | changes)
    arguments = {"train_dataset": prompts_of(toy)} | arguments
    with pytest.raises(error, match=message):
        GDCTrainer("no/such/model", args=args, **arguments)


@pytest.mark.parametrize("name", FORBIDS)
@pytest.mark.parametrize("options", [{"divergence": "reverse_kl"}, {"divergence": "alpha", "alpha": 1.0}])
def test_an_infinite_divergence_is_refused_before_the_model_is_loaded(toy, tmp_path, name, options):
    args = gdc_config(tmp_path, beta=None, **options)
    rule = r"`likelihood` must not forbid .*is infinite .*'forward_kl', 'js', 'tv', .*'alpha' below 1"
    with pytest.raises(ValueError, match=rule):
        GDCTrainer("no/such/model", args=args, train_dataset=prompts_of(toy), likelihood=FORBIDS[name])


def test_arguments_of_another_class_are_refused(toy, tmp_path):
    with pytest.raises(TypeError, match=r"`args` must be a GDCConfig, got PPOConfig\. Replace the class name"):
        GDCTrainer("no/such/model", length, config(tmp_path, PPOConfig), train_dataset=prompts_of(toy))


def test_a_reward_that_forbids_is_refused_by_the_reverse_kl_as_it_comes(toy, tmp_path):
    def reward(prompts, completions, completion_ids, **kwargs):
        return [
            -math.inf if 0 in ids else r
            for ids, r in zip(completion_ids, toy_reward(prompts, completions, completion_ids), strict=True)
        ]

    with pytest.raises(ValueError, match=r"'reward' must return finite .*'reverse_kl', got -inf .* is infinite"):
        trainer(toy, gdc_config(tmp_path, divergence="reverse_kl"), None, reward).train()
    trained = trainer(toy, gdc_config(tmp_path, max_steps=2), None, reward)
    trained.train()
    drawn = trained.rollouts[0].rewards
    assert logged(trained, "posterior/satisfaction")[0] == pytest.approx((drawn > -math.inf).float().mean().item())
    assert trained.state.log_history[0]["reward"] == pytest.approx(drawn[drawn > -math.inf].mean().item(), rel=1e-5)
    assert "posterior/elbo" not in trained.state.log_history[0]


BAD = {
    "nan": (lambda n: [math.nan] * n, ValueError, "'bad' returned nan for completion 0"),
    "infinity": (lambda n: [math.inf] * n, ValueError, "'bad' returned inf for completion 0"),
    "too few": (
        lambda n: [1] * (n - 1),
        ValueError,
        "'bad' must return one reward for each of the 24|one reward for each",
    ),
    "an exception": (lambda n: 1 / 0, ZeroDivisionError, "division by zero"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("evidence", ["reward", "condition", "moments"])
def test_bad_features_are_named(toy, tmp_path, kind, evidence):
    value, error, message = BAD[kind]

    def bad(completions, **kwargs):
        return value(len(completions))

    likelihoods = {"condition": Constraint(bad), "moments": MomentLikelihood({"bad": bad}, {"bad": 1.0})}
    arguments = {} if evidence == "reward" else {"likelihood": likelihoods[evidence]}
    args = gdc_config(tmp_path, beta=0.5 if evidence == "reward" else None)
    with pytest.raises(error, match=message):
        trainer(toy, args, None, bad, **arguments).train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_likelihood_that_is_no_number_is_refused(toy, tmp_path, value):
    class Broken:
        def log_likelihood(self, prompts, completions, completion_ids, columns=None):
            return torch.full((len(prompts),), value)

    with pytest.raises(ValueError, match=r"`Broken\.log_likelihood` must be finite, or -inf"):
        trainer(toy, gdc_config(tmp_path, beta=None), likelihood=Broken()).train()


def test_a_clip_of_a_plain_likelihood_is_the_same_run_as_its_reward(toy, tmp_path):
    """r/β as reward functions, and as a likelihood."""
    runs = []
    for arguments in ({"reward_funcs": toy_reward}, {"likelihood": RewardLikelihood(toy_reward, 0.5)}):
        args = gdc_config(tmp_path, max_steps=2, beta=0.5 if "reward_funcs" in arguments else None)
        torch.manual_seed(0)
        runs.append(trainer(toy, args, **arguments))
        runs[-1].train()
    for name, weight in weights(runs[0].model).items():
        torch.testing.assert_close(weights(runs[1].model)[name], weight, rtol=1e-4, atol=1e-6)
    assert runs[0].beta == 0.5
    assert runs[1].beta == 1.0


@pytest.mark.parametrize("is_async", [True, False])
def test_columns_reach_the_likelihood_and_separate_z(toy, tmp_path, is_async):
    """Two rows of the same prompt with another column are two targets."""
    seen = []

    def check(prompts, completion_ids, first, **kwargs):
        seen.extend(zip(prompts, first, strict=True))
        return [ids[0] == token for ids, token in zip(completion_ids, first, strict=True)]

    async def check_async(**arguments):
        return check(**arguments)

    rows = {"prompt": ["a", "a", "b"], "first": [0, 1, 0]}
    sizes = {"per_device_train_batch_size": 384, "num_generations": 128, "learning_rate": 0.0}
    likelihood = Constraint(check_async if is_async else check)
    args = gdc_config(tmp_path, beta=None, **sizes)
    trained = trainer(toy, args, likelihood=likelihood, train_dataset=Dataset.from_dict(rows))
    trained.train()
    assert set(seen) == {("a", 0), ("a", 1), ("b", 0)}
    assert len(trained.objective.target.normalizers.pool) == 3
    with torch.no_grad():
        log_prior = toy.log_probs(toy.model, ["a", "a", "b"])
    chosen = torch.tensor([[ids[0] == token for ids in toy.completion_ids] for token in rows["first"]])
    expected = log_prior.masked_fill(~chosen, -math.inf).logsumexp(-1)
    keys = trained.rollouts[0].prompt_keys.unique()
    p = expected.exp()
    se = ((1 - p) / p / 128).sqrt()  # of log Z
    found = trained.objective.target.normalizers.log_z(keys).sort().values
    errors = (found - expected.double().sort().values) / se[expected.argsort()]
    assert errors.abs().max() < 4.5, errors
    assert (expected[0] - expected[1]).abs() > 0.2


def test_the_features_are_those_of_the_last_call():
    reward = LikelihoodReward(FORBIDS["in a product"])
    values = reward(["a", "b"], ["", ""], [[0, 1], [1]], trainer_state=None, log_extra=None, log_metric=None)
    assert values[0] == -math.inf
    assert math.isfinite(values[1])
    assert {name: column.tolist() for name, column in reward.features.items()}["no_a"] == [0.0, 1.0]


def test_the_default_beta(tmp_path):
    assert beta_of(gdc_config(tmp_path, beta=None), None) == 0.05
    assert beta_of(gdc_config(tmp_path, beta=None), Constraint(no_a)) == 1.0
