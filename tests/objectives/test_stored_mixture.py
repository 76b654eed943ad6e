"""Stored draws of the prior beside the policy's own: the gradient of the mixture is that of the divergence."""

import math

import pytest
import torch

from rlhf_bayes.objectives import FDivergenceObjective, PosteriorTarget, ReplayBuffer
from rlhf_bayes.testing import EnumerableLM

from ..gradients import assert_mean_gradient
from .drawing import drawn, gradient_of, know_log_z, rollout_of, world_of
from .test_exact_gradients import exact_divergence, exact_gradient

FRESH, STORED = 24, 24  # completions a prompt


class WithStored:
    """An objective whose batches hold stored completions too."""

    def __init__(self, objective, stored, drawn_by_prior):
        self.objective, self.stored, self.drawn_by_prior = objective, stored, drawn_by_prior

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def batch(self, rollout):
        return self.objective.with_stored(self.objective.batch(rollout), self.stored, self.drawn_by_prior)


@pytest.mark.parametrize(
    ("divergence", "other"),
    [("forward_kl", False), ("js", False), ("reverse_kl", False), ("js", True)],
)
def test_the_expected_gradient_is_that_of_the_divergence(divergence, other):
    """Half of the completions come from the prior, or from another model, and are weighted by the mixture or by q."""
    toy = EnumerableLM(max_completion_length=3)
    policy, prior = toy.random_policy(noise=0.05, seed=2), toy.random_policy(noise=0.0)
    evidence = toy.log_likelihood  # without symmetry
    world = world_of(policy)
    target = PosteriorTarget(world, beta=1.0)
    with torch.no_grad():
        know_log_z(target, (toy.log_probs(prior) + evidence).logsumexp(-1))
        log_pi, log_prior = toy.log_probs(policy), toy.log_probs(prior)
        log_q = toy.log_probs(toy.random_policy(noise=0.05, seed=5)) if other else log_prior
    replay = ReplayBuffer(1, "uniform", seed=0)
    objective = FDivergenceObjective(world, target, replay, divergence=divergence, baseline="constant")
    expected = exact_gradient(policy, exact_divergence(toy, policy, prior, evidence, divergence))
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(20):
        fresh = rollout_of(toy, policy, prior, drawn(log_pi, FRESH, generator), evidence)
        stored = rollout_of(toy, policy, prior, drawn(log_q, STORED, generator), evidence, log_q, "store")
        samples.append(gradient_of(WithStored(objective, stored, not other), policy, fresh))
    assert_mean_gradient(torch.stack(samples), expected)


def test_the_weights_are_those_of_the_mixture():
    toy = EnumerableLM(max_completion_length=3)
    policy, prior = toy.random_policy(noise=0.3, seed=2), toy.random_policy(noise=0.0)
    world = world_of(policy)
    replay = ReplayBuffer(1, "uniform", seed=0)
    objective = FDivergenceObjective(world, PosteriorTarget(world, beta=1.0), replay)
    columns = {n: torch.arange(3 * n).view(3, n) for n in (2, 6)}
    fresh = rollout_of(toy, policy, prior, columns[6], toy.log_likelihood)
    stored = rollout_of(toy, policy, prior, columns[2], toy.log_likelihood, toy.log_prior, "store")
    batch = objective.with_stored(objective.batch(fresh), stored, True)
    with torch.no_grad():
        density = 0.75 * toy.log_probs(policy).exp() + 0.25 * toy.log_prior.exp()  # (P, N)
    expected = torch.cat([density.gather(1, columns[n]).flatten() for n in (6, 2)])
    torch.testing.assert_close(batch.log_proposal.exp(), expected, rtol=1e-4, atol=0)
    own = objective.with_stored(objective.batch(fresh), stored, False).log_proposal
    torch.testing.assert_close(own[-6:], toy.log_prior.gather(1, columns[2]).flatten(), rtol=1e-4, atol=0)
    assert math.isfinite(batch.log_z[-1])  # of the prompt, from fresh completions
