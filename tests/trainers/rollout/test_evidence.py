"""Evidence as both trainers take it: what is refused before the model loads, and what stops a run that can go on."""

import math
import re

import pytest
import torch

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer
from rlhf_bayes.likelihoods import Constraint, ProductLikelihood, RewardLikelihood
from rlhf_bayes.testing import toy_reward

from ..training import Recorder, config, logged, prompts_of, trainer, weights

OBJECTIVES = {
    "ppo": (PPOConfig, PPOTrainer, {}),
    "reverse_kl": (GDCConfig, GDCTrainer, {"divergence": "reverse_kl"}),
    "alpha": (GDCConfig, GDCTrainer, {"divergence": "alpha", "alpha": 1.0}),
    "forward_kl": (GDCConfig, GDCTrainer, {"divergence": "forward_kl"}),
    "log_variance": (GDCConfig, GDCTrainer, {"divergence": "log_variance"}),
}
INFINITE = ("ppo", "reverse_kl", "alpha")


class Own:
    """r/0.5 of the toy; from some call on, completions that begin with token 0 are forbidden."""

    def __init__(self, forbids_from=1, **attributes):
        self.forbids_from, self.calls = forbids_from, 0
        self.__dict__.update(attributes)

    def log_likelihood(self, prompts, completions, completion_ids, columns=None):
        self.calls += 1
        nats = torch.tensor(toy_reward(prompts, completions, completion_ids)) / 0.5
        begins = torch.tensor([ids[0] == 0 for ids in completion_ids])
        return torch.where(begins & (self.calls >= self.forbids_from), -torch.inf, nats)


def nats_config(objective, folder, **changes):
    """A configuration for a likelihood: `beta` is left at its default."""
    kind, _, options = OBJECTIVES[objective]
    beta = kind.__dataclass_fields__["beta"].default
    return config(folder, kind, **{"beta": beta} | options | changes)


def no_a(completion_ids, **kwargs):
    return [0 not in ids for ids in completion_ids]


CONDITION = {"likelihood": Constraint(no_a)}
# name: changes of the configuration, arguments, error, message
REFUSED = {
    "neither": ({}, {}, ValueError, "One of `reward_funcs` and `likelihood` must be given, got neither"),
    "both": ({}, {"reward_funcs": toy_reward} | CONDITION, ValueError, r"got both\. .*posterior\.tilt"),
    "a function": ({}, {"likelihood": no_a}, TypeError, "`likelihood` must be an object with .*got function"),
    "a class": ({}, {"likelihood": Own}, TypeError, "`likelihood` must be an object with .*got the class Own"),
    "tokenizers": (
        {},
        {"likelihood": Own(), "reward_processing_classes": [None]},
        ValueError,
        "`reward_processing_classes` must be left out with `likelihood`",
    ),
    "no bool": ({}, {"likelihood": Own(forbids="yes")}, TypeError, r"`Own\.forbids` must be True, False or None"),
    "beta": ({"beta": 0.5}, {"likelihood": Own()}, ValueError, r"`beta` must be left out with `likelihood`, got 0\.5"),
    "beta 0": ({"beta": 0.0}, {"likelihood": Own()}, ValueError, "`beta` must be left out with `likelihood`, got 0"),
    "weights": ({"reward_weights": [1.0]}, CONDITION, ValueError, "`reward_weights` must be left out"),
    "a clip": ({"reward_clip_range": (-1.0, 1.0)}, CONDITION, ValueError, "`reward_clip_range` must be left out"),
    "an eos penalty": ({"missing_eos_penalty": 1.0}, CONDITION, ValueError, "`missing_eos_penalty` must be left out"),
    "adaptive β": ({"target_kl": 3.0}, {"likelihood": Own()}, ValueError, "`target_kl` must be left out .* adapts β"),
    "a condition": ({}, CONDITION, ValueError, r"`likelihood` must not forbid completions with PPO.*'forward_kl'"),
    "in a product": (
        {},
        {"likelihood": ProductLikelihood([Own(), Constraint(no_a)])},
        ValueError,
        "must not forbid completions with PPO.*got ProductLikelihood with `forbids` = True",
    ),
    "one's own": ({}, {"likelihood": Own(forbids=True)}, ValueError, "must not forbid completions with PPO"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ppo_refuses_before_the_model_is_loaded(toy, tmp_path, name):
    changes, arguments, error, message = REFUSED[name]
    args = nats_config("ppo", tmp_path, **changes)
    with pytest.raises(error, match=message):
        PPOTrainer("no/such/model", args=args, train_dataset=prompts_of(toy), **arguments)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evidence_that_says_that_it_forbids_is_refused_by_what_is_infinite_there(toy, tmp_path, objective):
    args = nats_config(objective, tmp_path)
    arguments = {"args": args, "train_dataset": prompts_of(toy), "likelihood": Own(forbids=True)}
    error, message = (
        (ValueError, r"`likelihood` must not forbid .*is infinite .*'log_variance'")
        if objective in INFINITE
        else (OSError, "no/such/model")
    )
    with pytest.raises(error, match=message):
        OBJECTIVES[objective][1]("no/such/model", **arguments)


def test_ppo_on_a_likelihood_is_ppo_on_its_reward_in_nats(toy, tmp_path):
    """J/β in place of J: the gradient is 1/β times as large, and all that is in nats is the same."""
    runs, recorders = [], []
    for arguments in ({}, {"likelihood": RewardLikelihood(toy_reward, 0.5)}):
        # the critic is 0 as it starts: nothing but the reward tells the two runs apart
        changes = {"learning_rate": 0.0, "beta": 0.05 if arguments else 0.5}
        recorders.append(Recorder())
        model = toy.random_policy(seed=3)
        arguments |= {"ref_model": toy.random_policy(noise=0.0), "callbacks": [recorders[-1]]}
        runs.append(trainer(toy, config(tmp_path, **changes), model, **arguments))
        runs[-1].train()
    of_reward, of_nats = (recorder.gradients[0] for recorder in recorders)
    assert max(gradient.abs().max() for gradient in of_nats.values()) > 0.1
    for name, gradient in of_reward.items():
        torch.testing.assert_close(of_nats[name] * 0.5, gradient, rtol=1e-3, atol=1e-6)
    for name in ("elbo", "log_z", "gap", "kl_to_prior", "importance_ess"):
        mine, theirs = (logged(run, f"posterior/{name}") for run in runs)
        assert mine == pytest.approx(theirs, rel=1e-4), name
    assert (logged(runs[0], "ppo/beta"), logged(runs[1], "ppo/beta")) == ([0.5], [1.0])
    assert logged(runs[1], "reward")[0] == pytest.approx(2 * logged(runs[0], "reward")[0], rel=1e-5)
    assert logged(runs[1], "rewards/log_likelihood/mean") == logged(runs[1], "reward")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evidence_that_does_not_say_is_taken_at_its_word_until_it_forbids(toy, tmp_path, objective):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 10, "learning_rate": 1e-2}
    run = trainer(toy, nats_config(objective, tmp_path / "run", **changes), likelihood=Own(forbids_from=4))
    if objective not in INFINITE:
        run.train()
        assert run.state.global_step == 4
        assert logged(run, "posterior/satisfaction")[-1] < 1
        return
    with pytest.raises(ValueError, match=r"of Own must be finite .*attribute `forbids` to True") as caught:
        run.train()
    finite = r"`GDCTrainer` can take it, with `divergence` 'forward_kl', .*'alpha' below 1, or 'log_variance'"
    assert re.search(finite, str(caught.value))
    assert "Training stopped at step 3." in "\n".join(caught.value.__notes__)
    # with evidence that is finite it goes on as if nothing had been
    whole = trainer(toy, nats_config(objective, tmp_path / "whole", **changes), likelihood=Own(math.inf))
    whole.train()
    resumed = trainer(toy, nats_config(objective, tmp_path / "run", **changes), likelihood=Own(math.inf))
    resumed.train(resume_from_checkpoint=True)
    expected = weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed.model).items())


def test_the_part_of_a_product_that_did_not_say_is_named(toy, tmp_path):
    likelihood = ProductLikelihood([RewardLikelihood(toy_reward, 0.5), Own(forbids=False)])
    with pytest.raises(ValueError, match="The log-likelihood of Own or RewardLikelihood must be finite with PPO"):
        trainer(toy, nats_config("ppo", tmp_path), likelihood=likelihood).train()
