"""The expected gradient of each objective is that of its exact loss, by autograd over all completions."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.lm import Critic
from rlhf_bayes.numerics import f_divergence
from rlhf_bayes.numerics.f_divergence import divergence_cases
from rlhf_bayes.objectives import (
    FDivergenceObjective,
    LogVarianceObjective,
    PosteriorTarget,
    PPOObjective,
    ReplayBuffer,
)
from rlhf_bayes.objectives.gdc_losses import LOG_VARIANCE
from rlhf_bayes.objectives.ridge_critic import RidgeCritic
from rlhf_bayes.testing import EnumerableLM

from ..gradients import assert_mean_gradient
from .drawing import drawn, gradient_of, know_log_z, rollout_of, world_of

DIVERGENCES = {name: {} if alpha is None else {"alpha": alpha} for name, alpha in divergence_cases()}
DIVERGENCES |= {LOG_VARIANCE: {}}
SIZE = 64  # completions a prompt


def exact_gradient(policy, value):
    parameters = [parameter for name, parameter in policy.named_parameters() if "critic" not in name]
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])  # (D,)


def exact_divergence(toy, policy, prior, log_likelihood, divergence, alpha=None):
    """Mean over prompts, with gradient: ()."""
    log_target = (toy.log_probs(prior).detach() + log_likelihood).log_softmax(-1)  # (P, N)
    name = "reverse_kl" if divergence == LOG_VARIANCE else divergence
    return f_divergence(log_target, toy.log_probs(policy), name, alpha).mean()


def gdc_objective(toy, policy, prior, log_likelihood, divergence, replay_batches=1, **options):
    """β is 1, and Z is known."""
    world = world_of(policy)
    target = PosteriorTarget(world, beta=1.0)
    with torch.no_grad():
        know_log_z(target, (toy.log_probs(prior) + log_likelihood).logsumexp(-1))
    replay = ReplayBuffer(replay_batches, "uniform", seed=0)
    if divergence == LOG_VARIANCE:
        return LogVarianceObjective(world, target, replay, **options)
    return FDivergenceObjective(world, target, replay, divergence=divergence, **options)


def check(
    toy, policy, log_likelihood, divergence, prior=None, proposal=None, drawn_from="policy", steps=20, **options
):
    """The mean gradient over rollouts against that of the exact divergence, within standard errors."""
    prior = toy.random_policy(noise=0.0) if prior is None else prior
    options = DIVERGENCES[divergence] | options
    alpha = options.get("alpha")
    expected = exact_gradient(policy, exact_divergence(toy, policy, prior, log_likelihood, divergence, alpha))
    objective = gdc_objective(toy, policy, prior, log_likelihood, divergence, **options)
    with torch.no_grad():
        log_q = toy.log_probs(policy if proposal is None else proposal)  # (P, N)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(steps):
        columns = drawn(log_q, SIZE, generator)
        rollout = rollout_of(toy, policy, prior, columns, log_likelihood, log_q, drawn_from)
        samples.append(gradient_of(objective, policy, rollout))
    assert_mean_gradient(torch.stack(samples), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_on_policy(toy, divergence):
    check(toy, toy.random_policy(noise=0.05, seed=2), toy.log_likelihood, divergence)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_with_another_baseline(toy, baseline):
    check(toy, toy.random_policy(noise=0.05, seed=2), toy.log_likelihood, "js", baseline=baseline)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tv"])
def test_from_draws_of_the_prior(toy, divergence):
    # two that cover each other: the prior's rarest completions would take all the weight
    prior, policy = toy.random_policy(noise=0.05, seed=2), toy.random_policy(noise=0.05, seed=3)
    check(toy, policy, toy.log_likelihood, divergence, prior, proposal=prior, drawn_from="prior")


@pytest.mark.parametrize("divergence", ["js", "alpha"])
def test_with_forbidden_completions(toy, divergence):
    forbidden = torch.tensor([ids[0] == 0 for ids in toy.completion_ids]).expand_as(toy.log_prior)
    log_likelihood = toy.log_likelihood.masked_fill(forbidden, -math.inf)
    policy = toy.random_policy(noise=0.05, seed=2)
    assert 0.1 < toy.log_probs(policy).exp()[forbidden].sum() / 3 < 0.9
    check(toy, policy, log_likelihood, divergence)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha"])
def test_of_draws_of_an_earlier_policy(toy, divergence):
    """Drawn from one policy, learnt by another: the ratio between them, and the Z of the target, are right."""
    drew, policy = toy.random_policy(0.05, seed=2), toy.random_policy(0.05, seed=3)
    check(toy, policy, toy.log_likelihood, divergence, proposal=drew, drawn_from="snapshot")


@pytest.mark.parametrize("replay_batches", [1, 3])
def test_log_variance_of_draws_of_another_policy(toy, replay_batches):
    """Off policy it is half the variance over what was drawn, whatever drew it: no importance weights."""
    drew, policy, prior = (toy.random_policy(noise, seed) for noise, seed in ((0.05, 2), (0.05, 3), (0.0, 0)))
    log_q = toy.log_probs(drew).detach()  # (P, N)
    difference = toy.log_probs(policy) - toy.log_prior - toy.log_likelihood
    mean = (log_q.exp() * difference).sum(-1, keepdim=True)
    expected = exact_gradient(policy, 0.5 * (log_q.exp() * (difference - mean) ** 2).sum(-1).mean())
    objective = gdc_objective(toy, policy, prior, toy.log_likelihood, "log_variance", replay_batches)
    generator, samples = torch.Generator().manual_seed(0), []
    for _ in range(20):
        columns = drawn(log_q, SIZE, generator)
        rollout = rollout_of(toy, policy, prior, columns, toy.log_likelihood, log_q, "snapshot")
        samples.append(gradient_of(objective, policy, rollout))
    # steps that share completions say less than as many that do not
    assert_mean_gradient(torch.stack(samples), expected, limit=5.0 * replay_batches**0.5)


@pytest.mark.parametrize("divergence", ["forward_kl", "log_variance"])
def test_micro_batches_add_up(toy, divergence):
    policy, prior = toy.random_policy(noise=0.05, seed=2), toy.random_policy(noise=0.0)
    with torch.no_grad():
        columns = drawn(toy.log_probs(policy), 8, torch.Generator().manual_seed(1))
    rollout = rollout_of(toy, policy, prior, columns, toy.log_likelihood)
    whole, parts = (
        gradient_of(
            gdc_objective(toy, policy, prior, toy.log_likelihood, divergence), policy, rollout, micro_batches=sizes
        )
        for sizes in ((), (5, 11, 8))
    )
    assert whole.abs().max() > 1e-3
    assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first_step", [True, False])
def test_centres_are_of_the_policy_that_steps(toy, first_step):
    """Of a step that is not the rollout's first, the policy is another one than that which scored the rollout."""
    prior = toy.random_policy(noise=0.0)
    drew, policy = (toy.random_policy(noise=0.05, seed=seed) for seed in (2, 2 if first_step else 3))
    with torch.no_grad():
        columns = drawn(toy.log_probs(drew), 8, torch.Generator().manual_seed(1))
    rollout = rollout_of(toy, drew, prior, columns, toy.log_likelihood)
    gradients, forwards = [], []
    for sizes in ((), (5, 11, 8)):
        objective = gdc_objective(toy, policy, prior, toy.log_likelihood, LOG_VARIANCE)
        log_probs = objective.world.log_probs
        objective.world.log_probs = lambda batch, of=log_probs: forwards.append(len(batch)) or of(batch)
        gradients.append(gradient_of(objective, policy, rollout, micro_batches=sizes, first_step=first_step))
    assert forwards == ([] if first_step else [5, 11, 8])
    assert gradients[0].abs().max() > 1e-3
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ppo_ascends_the_kl_regularised_reward(temperature):
    """With λ = 1 the gradient is that of J whatever the critic says, prompts of three lengths padded on the left."""
    toy = EnumerableLM(vocab_size=4, max_completion_length=3, temperature=temperature)
    policy, prior = toy.random_policy(noise=0.1, seed=2), toy.random_policy(noise=0.0)
    expected = torch.cat([gradient.flatten() for gradient in toy.objective_gradient(policy).values()])  # (D,)
    critic = Critic(policy.config.hidden_size)
    torch.nn.init.normal_(critic.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    policy.add_module("critic", critic)
    objective = PPOObjective(world_of(policy, temperature=temperature), beta=toy.beta, vf_coef=0.0)
    with torch.no_grad():
        log_policy = toy.log_probs(policy)
    generator, samples = torch.Generator().manual_seed(0), []
    for _ in range(60):
        rollout = rollout_of(toy, policy, prior, drawn(log_policy, 32, generator), toy.rewards)
        gradient = gradient_of(objective, policy, rollout, temperature)
        # the loss is a mean over tokens, J one over completions
        samples.append(-gradient * rollout.completion_mask.sum() / len(rollout.rewards))
    assert_mean_gradient(torch.stack(samples), expected)


def test_a_fitted_critic_and_rewards_of_prefixes_do_not_bias_ppo(toy):
    """Whatever the critic was fitted to: here to prefix rewards that say the contrary of the reward."""
    policy, prior = toy.random_policy(noise=0.1, seed=2), toy.random_policy(noise=0.0)
    expected = torch.cat([gradient.flatten() for gradient in toy.objective_gradient(policy).values()])  # (D,)
    world = world_of(policy)
    objective = PPOObjective(world, beta=toy.beta, critic=RidgeCritic(world))
    with torch.no_grad():
        log_policy = toy.log_probs(policy)
    generator, samples = torch.Generator().manual_seed(0), []
    for _ in range(60):
        rollout = rollout_of(
            toy, policy, prior, drawn(log_policy, 32, generator), toy.rewards, states=objective.states
        )
        ids = rollout.completion_ids.float()
        rollout = replace(rollout, prefix_rewards=3 - 2 * (ids.cumsum(-1) - ids))
        gradient = gradient_of(objective, policy, rollout)
        samples.append(-gradient * rollout.completion_mask.sum() / len(rollout.rewards))
    assert_mean_gradient(torch.stack(samples), expected)
    assert objective.critic.forecast(torch.ones(1, 1, objective.critic.sums.gram.size(0) - 1)).abs() > 1e-3


def test_ppo_with_a_fitted_critic_has_no_gradient_at_the_posterior():
    toy = EnumerableLM(vocab_size=4, max_completion_length=3)
    policy, prior = toy.random_policy(noise=0.1, seed=5), toy.random_policy(noise=0.0)
    rewards = toy.beta * (toy.log_probs(policy).detach() - toy.log_prior + 0.7)  # log Z = 0.7
    world = world_of(policy)
    objective = PPOObjective(world, beta=toy.beta, critic=RidgeCritic(world))
    columns = torch.arange(len(toy.completion_ids)).expand(3, -1)
    rollout = rollout_of(toy, policy, prior, columns, rewards, states=objective.states)
    rollout = replace(rollout, prefix_rewards=rollout.completion_ids.float())
    # the first rollout has siblings as its baseline, the second the critic, which has seen one constant return
    for _ in range(2):
        assert gradient_of(objective, policy, rollout).abs().max() < 1e-4
    moved = replace(rollout, rewards=1.05 * rollout.rewards)
    assert gradient_of(objective, policy, moved).abs().max() > 3e-4


def test_ppo_has_no_gradient_at_the_posterior():
    toy = EnumerableLM(vocab_size=4, max_completion_length=3)
    policy, prior = toy.random_policy(noise=0.1, seed=5), toy.random_policy(noise=0.0)
    # the policy is the posterior of this reward, with log Z = 0, which a new critic knows
    rewards = toy.beta * (toy.log_probs(policy).detach() - toy.log_prior)
    policy.add_module("critic", Critic(policy.config.hidden_size))
    columns = torch.arange(len(toy.completion_ids)).expand(3, -1)
    rollout = rollout_of(toy, policy, prior, columns, rewards)
    assert gradient_of(PPOObjective(world_of(policy), beta=toy.beta), policy, rollout).abs().max() < 1e-4
    moved = rollout_of(toy, policy, prior, columns, 1.01 * rewards)
    assert gradient_of(PPOObjective(world_of(policy), beta=toy.beta), policy, moved).abs().max() > 3e-4
