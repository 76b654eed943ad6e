"""What PPO keeps of a rollout besides its gradient: moments of the evidence, and a β that cannot change unseen."""

from dataclasses import replace

import pytest
import torch

from rlhf_bayes.lm import Critic
from rlhf_bayes.objectives import PPOObjective

from .drawing import rollout_of, world_of


@pytest.fixture(scope="module")
def policy(toy):
    policy = toy.random_policy(noise=0.1, seed=2)
    policy.add_module("critic", Critic(policy.config.hidden_size))
    return policy


def test_features_of_the_evidence_are_reported(toy, policy):
    world = world_of(policy)
    columns = torch.tensor([[0, 3, 5], [1, 1, 2], [7, 4, 6]])
    rollout = rollout_of(toy, policy, toy.model, columns, toy.rewards)
    happy = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    PPOObjective(world, beta=0.5).batch(replace(rollout, features={"happy": happy}))
    assert world.metrics["posterior/moments/happy"] == pytest.approx([4 / 9])


def test_the_state_of_another_beta_is_refused_unless_it_adapts(policy):
    world = world_of(policy)
    saved = PPOObjective(world, beta=0.5).state_dict()
    with pytest.raises(ValueError, match=r"`beta` must be that of the checkpoint, 0\.5, got 1\.0"):
        PPOObjective(world, beta=1.0).load_state_dict(saved)
    adapts = PPOObjective(world, beta=1.0, target_kl=0.1)
    adapts.load_state_dict(saved)
    assert adapts.beta == 0.5


def test_a_model_without_a_critic_is_refused(toy):
    policy = toy.random_policy(noise=0.1, seed=2)
    rollout = rollout_of(toy, policy, toy.model, torch.tensor([[0, 1]]), toy.rewards)
    with pytest.raises(ValueError, match="needs the critic's values, got None"):
        PPOObjective(world_of(policy), beta=0.5).batch(rollout)
