"""Which per-token KL estimate, put in the reward, has the posterior as its optimum: by enumeration of the toy."""

import pytest
import torch
from torch import Tensor

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.numerics import k1, k2, k3


def expected_gradient(toy, policy, rewards: Tensor, estimator) -> Tensor:
    """
    Gradient that a policy-gradient method follows in expectation, flat: Σ_x π(x)·(r − β·Σ_t k_t)(x)·∇log π(x), the
    penalty held constant as a reward is.
    """
    penalties = []
    for prompt in toy.prompts:
        rows = [prompt] * len(toy.completion_ids)
        log_p, log_q = (
            LanguageModel(model, toy.tokenizer, toy.max_completion_length).token_log_probs(rows, toy.completion_ids)[0]
            for model in (policy, toy.random_policy(noise=0.0))
        )
        penalties.append(estimator(log_p, log_q).sum(-1))  # (N,); padding is 0 in both
    log_prob = toy.log_probs(policy)  # (P, N)
    returns = rewards - toy.beta * torch.stack(penalties)  # (P, N)
    objective = (log_prob.exp() * returns).sum(-1).mean()
    gradients = torch.autograd.grad(objective, list(policy.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.fixture(scope="module")
def target(toy):
    """A policy that is the posterior of the reward β·log(target/π0), with log Z = 0."""
    policy = toy.random_policy(noise=0.1, seed=5)
    return policy, toy.beta * (toy.log_probs(policy).detach() - toy.log_prior)


def test_k1_in_the_reward_stands_still_at_the_posterior(toy, target):
    policy, rewards = target
    assert toy.reverse_kl(policy, rewards / toy.beta).abs().max() < 1e-5  # it is the posterior
    moved = expected_gradient(toy, toy.random_policy(noise=0.1, seed=6), rewards, k1)
    assert expected_gradient(toy, policy, rewards, k1).norm() < 1e-4 * moved.norm()


@pytest.mark.parametrize("estimator", [k2, k3])
def test_k2_and_k3_in_the_reward_push_away_from_the_posterior(toy, target, estimator):
    policy, rewards = target
    moved = expected_gradient(toy, toy.random_policy(noise=0.1, seed=6), rewards, k1)
    gradient = expected_gradient(toy, policy, rewards, estimator)
    assert gradient.norm() > 0.05 * moved.norm()


def test_k1_in_the_reward_follows_the_gradient_of_the_objective(toy):
    policy = toy.random_policy(noise=0.1, seed=6)
    exact = torch.cat([gradient.flatten() for gradient in toy.objective_gradient(policy).values()])
    torch.testing.assert_close(expected_gradient(toy, policy, toy.rewards, k1), exact, rtol=1e-3, atol=1e-5)
