"""
The expected gradient of GDCTrainer is that of the exact divergence, by autograd over all completions.

`tests/objectives/test_exact_gradients.py` asks it of every divergence without a trainer; here stands what the trainer
adds: its draws, its iterations over a rollout, and its replay.
"""

import pytest
import torch
from transformers import TrainerCallback

from rlhf_bayes.numerics import f_divergence

from ...gradients import assert_mean_gradient
from ..training import Recorder, gdc_config, keep_log_z, table_reward, trainer

pytestmark = pytest.mark.slow

DIVERGENCES = {"js": {}, "tv": {}, "alpha": {"alpha": 0.5}}


class Moves(TrainerCallback):
    """Before each optimizer step, the policy gets the next of these weights, in turn."""

    def __init__(self, *models):
        self.weights = [{name: weight.clone() for name, weight in model.state_dict().items()} for model in models]

    def on_step_end(self, args, state, control, model, **kwargs):
        model.load_state_dict(self.weights[state.global_step % len(self.weights)])


def gradient_samples(toy, tmp_path, policy, prior, log_likelihood, steps=20, callbacks=(), **changes):
    """Gradients of the loss in every optimizer step, flat: (steps, D). Z is known, and the weights stand still."""
    recorder = Recorder()
    defaults = {"max_steps": steps, "learning_rate": 0.0, "logging_strategy": "no", "beta": 1.0}
    sizes = {"per_device_train_batch_size": 192, "num_generations": 64}
    args = gdc_config(tmp_path, **defaults | sizes | changes)
    reward = table_reward(toy, log_likelihood)
    trained = trainer(toy, args, policy, reward, ref_model=prior, callbacks=[recorder, *callbacks])
    with torch.no_grad():
        keep_log_z(trained, (toy.log_probs(prior) + log_likelihood).logsumexp(-1))
    trained.train()
    return torch.stack([torch.cat([step[name].flatten() for name in step]) for step in recorder.gradients])


def exact_gradient(policy, value):
    gradients = torch.autograd.grad(value, list(policy.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])  # (D,)


def exact_divergence(toy, policy, prior, log_likelihood, divergence, alpha=None):
    """Mean over prompts, with gradient: ()."""
    log_target = (toy.log_probs(prior).detach() + log_likelihood).log_softmax(-1)  # (P, N)
    return f_divergence(log_target, toy.log_probs(policy), divergence, alpha).mean()


def check(toy, tmp_path, policy, log_likelihood, divergence, prior=None, **changes):
    prior = toy.random_policy(noise=0.0) if prior is None else prior
    options = DIVERGENCES[divergence]
    expected = exact_gradient(policy, exact_divergence(toy, policy, prior, log_likelihood, divergence, **options))
    options = options | {"divergence": divergence} | changes
    assert_mean_gradient(gradient_samples(toy, tmp_path, policy, prior, log_likelihood, **options), expected)


def test_on_policy(toy, tmp_path):
    check(toy, tmp_path, toy.random_policy(noise=0.05, seed=2), toy.log_likelihood, "js")


def test_from_draws_of_the_prior(toy, tmp_path):
    # two that cover each other: the prior's rarest completions would take all the weight
    prior, policy = toy.random_policy(noise=0.05, seed=2), toy.random_policy(noise=0.05, seed=3)
    check(toy, tmp_path, policy, toy.log_likelihood, "tv", prior, proposal="prior")


def test_of_the_second_iteration_over_a_rollout(toy, tmp_path):
    """Drawn from one policy, learnt by another: the ratio between them, and the Z of the target, are right."""
    drew, policy, prior = (toy.random_policy(noise, seed) for noise, seed in ((0.05, 2), (0.05, 3), (0.0, 0)))
    expected = exact_gradient(policy, exact_divergence(toy, policy, prior, toy.log_likelihood, "alpha", alpha=0.5))
    options = {"divergence": "alpha", "alpha": 0.5, "num_iterations": 2}
    samples = gradient_samples(toy, tmp_path, drew, prior, toy.log_likelihood, 40, [Moves(drew, policy)], **options)
    assert_mean_gradient(samples[1::2], expected)


def test_log_variance_with_replay(toy, tmp_path):
    """Off policy it is half the variance over what was drawn, whatever drew it: no importance weights."""
    drew, policy, prior = (toy.random_policy(noise, seed) for noise, seed in ((0.05, 2), (0.05, 3), (0.0, 0)))
    proposal = toy.log_probs(drew).exp().detach()  # (P, N)
    difference = toy.log_probs(policy) - toy.log_prior - toy.log_likelihood
    mean = (proposal * difference).sum(-1, keepdim=True)
    expected = exact_gradient(policy, 0.5 * (proposal * (difference - mean) ** 2).sum(-1).mean())
    options = {"divergence": "log_variance", "num_iterations": 2, "replay_batches": 3}
    samples = gradient_samples(toy, tmp_path, drew, prior, toy.log_likelihood, 40, [Moves(drew, policy)], **options)
    # steps that share completions say less than as many that do not
    assert_mean_gradient(samples[1::2], expected, limit=5.0 * 3**0.5)
