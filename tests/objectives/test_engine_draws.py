"""Objectives on draws of an engine that is deliberately wrong: their gradient and optimum are those of the policy."""

from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.lm.forward import CompletionScores
from rlhf_bayes.objectives import (
    FDivergenceObjective,
    OneProcess,
    PosteriorTarget,
    PPOObjective,
    ReplayBuffer,
    Rollout,
)
from rlhf_bayes.objectives.ridge_critic import RidgeCritic

from .drawing import know_log_z

V = 3  # tokens; a completion is two of them
TEMPERATURE = 1.05  # of the engine, in the place of 1


class Table(NamedTuple):
    """A policy over all V² completions of one prompt, as tables of logits."""

    first: torch.Tensor
    """(V,)"""
    second: torch.Tensor
    """(V, V): logits of the second token after each first one."""

    @classmethod
    def random(cls, seed, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        sizes = ((V,), (V, V))
        return cls(*((scale * torch.randn(size, generator=generator)).requires_grad_() for size in sizes))

    def log_probs(self, temperature=1.0):
        """log-probs of both tokens of each completion: (V², 2)."""
        first, second = ((logits / temperature).log_softmax(-1) for logits in self)
        return torch.stack([first[:, None].expand(V, V), second], dim=-1).view(V * V, 2)


def rollout_of(policy, prior, rewards, drawn_from, log_q):
    """Each completion once."""
    n, ids = V * V, torch.cartesian_prod(torch.arange(V), torch.arange(V))
    with torch.no_grad():
        log_policy, log_prior = policy.log_probs(), prior.log_probs()
    return Rollout(
        prompt_ids=torch.zeros(n, 1, dtype=torch.long),
        prompt_mask=torch.ones(n, 1),
        completion_ids=ids,
        completion_mask=torch.ones(n, 2),
        prompt_keys=torch.zeros(n, dtype=torch.long),
        token_log_probs=log_policy,
        ref_token_log_probs=log_prior,
        token_entropy=torch.zeros(n, 2),
        log_proposal=log_policy.sum(-1) if drawn_from == "policy" else log_q,
        rewards=rewards,
        num_generations=1,
        values=torch.zeros(n, 2),
        drawn_from=drawn_from,
    )


def expected_loss(objective, policy, prior, rewards, drawn_from, temperature=TEMPERATURE):
    """E_q[loss] of a completion, with gradient. The engine draws q; `drawn_from` is what the objective is told."""
    with torch.no_grad():
        log_q = policy.log_probs(temperature).sum(-1)  # (V²,)
    batch = objective.batch(rollout_of(policy, prior, rewards, drawn_from, log_q))
    log_probs = policy.log_probs()
    zeros = torch.zeros(1, 2)
    losses = [
        objective.loss(CompletionScores(log_probs[row : row + 1], zeros, zeros, None), own)[0]
        for row, own in enumerate(batch.split([1] * len(batch)))
    ]
    return (log_q.exp() * torch.stack(losses)).sum()


def gdc(prior, rewards):
    world = OneProcess(lambda batch: torch.zeros(len(batch)), max_steps=1)
    target = PosteriorTarget(world, beta=1.0)
    know_log_z(target, (prior.log_probs().detach().sum(-1) + rewards).logsumexp(-1, keepdim=True))
    return FDivergenceObjective(world, target, ReplayBuffer(1, "uniform", seed=0), baseline="none")


def ppo(beta=0.7):
    world = OneProcess(lambda batch: torch.zeros(len(batch)), max_steps=1)
    return PPOObjective(world, beta=beta, lam=1.0, vf_coef=0.0)


@pytest.mark.slow
def test_gdc_trains_to_the_posterior_and_elsewhere_without_the_engines_log_probs():
    prior, rewards = Table.random(1), torch.randn(V * V, generator=torch.Generator().manual_seed(2))
    log_posterior = (prior.log_probs().detach().sum(-1) + rewards).log_softmax(-1)
    objective, found = gdc(prior, rewards), {}
    for drawn_from in ("engine", "policy"):
        policy = Table(*(logits.detach().clone().requires_grad_() for logits in prior))
        optimizer = torch.optim.Adam(policy, lr=0.15)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        for _ in range(100):
            optimizer.zero_grad()
            expected_loss(objective, policy, prior, rewards, drawn_from).backward()
            optimizer.step()
            schedule.step()
        log_policy = policy.log_probs().detach().sum(-1)
        found[drawn_from] = (log_posterior.exp() * (log_posterior - log_policy)).sum().item()
    assert found["engine"] < 1e-5
    assert found["policy"] > 1e-4


@pytest.mark.parametrize("temperature", [TEMPERATURE, 2.0])
def test_ppo_ascends_the_objective_of_the_policy(temperature):
    """E_q of its gradient is that of J; as if the policy had drawn what the engine drew, it is another one."""
    policy, prior = Table.random(3), Table.random(1)
    rewards = torch.randn(V * V, generator=torch.Generator().manual_seed(2))
    log_policy, log_prior = policy.log_probs().sum(-1), prior.log_probs().detach().sum(-1)
    objective = (log_policy.exp() * (rewards - 0.7 * (log_policy - log_prior))).sum()
    exact = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(-objective, policy)])

    def gradient(drawn_from):
        loss = expected_loss(ppo(), policy, prior, rewards, drawn_from, temperature)
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, policy)])

    assert_close(gradient("engine"), exact, atol=1e-5, rtol=1e-4)
    assert (gradient("policy") - exact).norm() > 0.1 * (temperature - 1) * exact.norm()


def test_the_value_loss_is_that_of_the_policy():
    """Its expectation is the squared error over the policy's completions, whatever drew."""
    policy, prior = Table.random(3), Table.random(1)
    rewards = torch.randn(V * V, generator=torch.Generator().manual_seed(2))
    objective = PPOObjective(OneProcess(lambda batch: torch.zeros(len(batch)), 1), beta=0.7, lam=1.0, vf_coef=1.0)
    objective.critic_warmup_steps = 1  # only the value loss
    with torch.no_grad():
        found = expected_loss(objective, policy, prior, rewards, "engine", temperature=2.0)
        log_policy = policy.log_probs().sum(-1)
        returns = rewards - 0.7 * (log_policy - prior.log_probs().sum(-1))
    assert_close(found, (log_policy.exp() * returns.square()).sum())  # two tokens, half of the square each


def test_a_fitted_critic_forecasts_returns_of_the_policy():
    """Fitted to a constant with draws of q, it is the mean under π."""
    policy, generator = Table.random(3), torch.Generator().manual_seed(0)
    with torch.no_grad():
        log_policy, log_q = (policy.log_probs(temperature).sum(-1) for temperature in (1.0, 2.0))
    returns = log_policy
    drawn = torch.multinomial(log_q.exp(), 20_000, replacement=True, generator=generator)
    weights = (log_policy - log_q)[drawn].exp()
    critic = RidgeCritic(OneProcess(lambda batch: torch.zeros(len(batch)), 1))
    features, mask = torch.zeros(len(drawn), 1, 1), torch.ones(len(drawn), 1, dtype=torch.bool)
    critic.learn(features, returns[drawn], mask, weights)
    exact, of_engine = ((log_p.exp() * returns).sum() for log_p in (log_policy, log_q))
    spread = (log_q.exp() * ((log_policy - log_q).exp() * (returns - exact)).square()).sum().sqrt()
    error = spread / len(drawn) ** 0.5
    assert abs(critic.forecast(features)[0, 0] - exact) < 4 * error
    assert abs(of_engine - exact) > 8 * error
