"""Two turns with an environment between them: every sum is over the policy's own tokens, by enumeration."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.lm import Critic
from rlhf_bayes.numerics import f_divergence
from rlhf_bayes.objectives import (
    FDivergenceObjective,
    LogVarianceObjective,
    PosteriorTarget,
    PPOObjective,
    ReplayBuffer,
)
from rlhf_bayes.objectives.ridge_critic import RidgeCritic
from rlhf_bayes.testing import EnumerableLM

from ..gradients import assert_mean_gradient
from .drawing import drawn, gradient_of, know_log_z, rollout_of, world_of
from .test_exact_gradients import exact_gradient

TOY = EnumerableLM(vocab_size=4, max_completion_length=3)
EOS = TOY.tokenizer.eos_token_id
OWN = torch.tensor([True, False, True])  # the policy writes a token, the environment answers by one, the policy ends
_words = [token for token in range(4) if token != EOS]
_generator = torch.Generator().manual_seed(4)
ANSWERS = dict(zip(_words, (2 * torch.randn(3, 3, generator=_generator)).log_softmax(-1), strict=True))
"""First token -> log-probabilities of the three answers, which do not end a completion."""


def _log_answer(ids):
    if len(ids) == 1:
        return 0.0  # the policy ended it before the environment could answer
    return -torch.inf if ids[1] == EOS else ANSWERS[ids[0]][_words.index(ids[1])].item()


LOG_ENVIRONMENT = torch.tensor([_log_answer(ids) for ids in TOY.completion_ids])  # (N,)


def own_log_probs(model):
    """log π of the policy's own tokens of all completions, (P, N), with gradient, by transformers alone."""
    rows = []
    for prompt in TOY.prompts:
        start = TOY.tokenizer(prompt)["input_ids"]
        padded = torch.tensor([start + ids + [EOS] * (3 - len(ids)) for ids in TOY.completion_ids])
        log_probs = model(input_ids=padded).logits[:, len(start) - 1 : -1].log_softmax(-1)  # (N, 3, V)
        log_probs = log_probs.gather(-1, padded[:, len(start) :, None]).squeeze(-1)
        lengths = torch.tensor([len(ids) for ids in TOY.completion_ids])
        kept = OWN & (torch.arange(3) < lengths[:, None])
        rows.append(torch.where(kept, log_probs, 0.0).sum(-1))
    return torch.stack(rows)


def masked(rollout):
    """The rollout with the mask, and with columns that are 0 outside of it."""
    mask = OWN[: rollout.completion_mask.size(1)].expand_as(rollout.completion_mask)
    names = ("token_log_probs", "ref_token_log_probs", "token_entropy")
    columns = {name: torch.where(mask, getattr(rollout, name), 0.0) for name in names}
    return replace(rollout, policy_mask=mask, log_proposal=columns["token_log_probs"].sum(-1), **columns)


def check(objective, policy, prior, rewards, expected, per_token):
    """The mean gradient over rollouts of policy and environment against the exact one."""
    with torch.no_grad():
        log_drawn = own_log_probs(policy) + LOG_ENVIRONMENT  # (P, N)
    assert_close(log_drawn.exp().sum(-1), torch.ones(3))
    generator, samples = torch.Generator().manual_seed(0), []
    for _ in range(60):
        rollout = rollout_of(
            TOY, policy, prior, drawn(log_drawn, 32, generator), rewards, states=getattr(objective, "states", None)
        )
        rollout = masked(rollout)
        gradient = gradient_of(objective, policy, rollout)
        # PPO's loss is a mean over the policy's tokens
        samples.append(gradient * (rollout.policy_tokens.sum() / len(rollout.rewards) if per_token else 1.0))
    assert_mean_gradient(torch.stack(samples), expected)


@pytest.mark.parametrize("critic", ["in the policy", "fitted"])
def test_ppo_ascends_the_reward_less_the_kl_of_own_tokens(critic):
    policy, prior = TOY.random_policy(noise=0.1, seed=2), TOY.random_policy(noise=0.0)
    log_policy = own_log_probs(policy)
    log_ratio = log_policy - own_log_probs(prior).detach()
    chances = (log_policy + LOG_ENVIRONMENT).exp()
    j = (chances * (TOY.rewards - TOY.beta * log_ratio)).sum(-1).mean()
    expected = exact_gradient(policy, -j)
    world = world_of(policy)
    options = {"critic": RidgeCritic(world)}
    if critic == "in the policy":
        head = Critic(policy.config.hidden_size)
        torch.nn.init.normal_(head.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(3))
        policy.add_module("critic", head)
        options = {"vf_coef": 0.0}
    objective = PPOObjective(world, beta=TOY.beta, lam=1.0, **options)
    check(objective, policy, prior, TOY.rewards, expected, per_token=True)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "log_variance"])
def test_gdc_descends_the_divergence_of_policy_and_environment(divergence):
    """From π0·P(answers)·exp(r/β)/Z to π·P(answers)."""
    policy, prior = TOY.random_policy(noise=0.05, seed=2), TOY.random_policy(noise=0.0)
    reached = LOG_ENVIRONMENT.isfinite()
    log_joint = (own_log_probs(policy) + LOG_ENVIRONMENT)[:, reached]
    log_density = (own_log_probs(prior).detach() + LOG_ENVIRONMENT + TOY.log_likelihood)[:, reached]
    name = "reverse_kl" if divergence == "log_variance" else divergence  # its gradient on the policy's draws
    expected = exact_gradient(policy, f_divergence(log_density.log_softmax(-1), log_joint, name).mean())
    world = world_of(policy)
    target = PosteriorTarget(world, beta=1.0)
    know_log_z(target, log_density.logsumexp(-1))
    replay = ReplayBuffer(1, "uniform", seed=0)
    if divergence == "log_variance":
        objective = LogVarianceObjective(world, target, replay)
    else:
        objective = FDivergenceObjective(world, target, replay, divergence=divergence)
    check(objective, policy, prior, TOY.log_likelihood, expected, per_token=False)


def objective_of(name, policy):
    world = world_of(policy)
    if name == "ppo":
        return PPOObjective(world, beta=0.5, critic=RidgeCritic(world))
    target, replay = PosteriorTarget(world, beta=0.5), ReplayBuffer(2, "uniform", seed=0)
    return LogVarianceObjective(world, target, replay)


def one_rollout(policy, prior, objective, rewards=TOY.rewards):
    columns = torch.randint(len(TOY.completion_ids), (3, 8), generator=torch.Generator().manual_seed(1))
    return rollout_of(TOY, policy, prior, columns, rewards, states=objective.states)


@pytest.mark.parametrize("name", ["ppo", "log_variance"])
def test_a_mask_of_ones_changes_nothing(name):
    policy, prior = TOY.random_policy(noise=0.1, seed=2), TOY.random_policy(noise=0.0)
    gradients, metrics = [], []
    for with_mask in (False, True):
        objective = objective_of(name, policy)
        rollout = one_rollout(policy, prior, objective)
        if with_mask:
            rollout = replace(rollout, policy_mask=torch.ones_like(rollout.completion_mask))
        # twice: the critic has learnt from the first, and the second step replays it
        gradients.append([gradient_of(objective, policy, rollout, micro_batches=(6, 18)) for _ in range(2)])
        metrics.append(dict(objective.world.metrics))
    assert metrics[0] == metrics[1]
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert gradients[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ppo", "log_variance"])
def test_metrics_and_micro_batches_leave_the_environment_out(name):
    policy, prior = TOY.random_policy(noise=0.1, seed=2), TOY.random_policy(noise=0.0)
    whole, parts = (objective_of(name, policy) for _ in range(2))
    rollout = masked(one_rollout(policy, prior, whole))
    first, second = (
        gradient_of(objective, policy, rollout, micro_batches=sizes)
        for objective, sizes in ((whole, ()), (parts, (5, 11, 8)))
    )
    assert_close(second, first, rtol=1e-4, atol=1e-6)
    columns = torch.randint(len(TOY.completion_ids), (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_ratio = (own_log_probs(policy) - own_log_probs(prior)).gather(1, columns)
    assert whole.world.metrics["posterior/kl_to_prior"] == pytest.approx([log_ratio.mean().item()], abs=1e-5)
    assert whole.world.metrics["posterior/elbo"] == pytest.approx(
        [(TOY.rewards.gather(1, columns) / 0.5 - log_ratio).mean().item()], abs=1e-5
    )


def test_columns_that_contain_the_environment_are_refused():
    policy, prior = TOY.random_policy(noise=0.1, seed=2), TOY.random_policy(noise=0.0)
    rollout = one_rollout(policy, prior, objective_of("ppo", policy))
    with pytest.raises(ValueError, match="`token_log_probs` must be 0 outside `policy_mask`"):
        replace(rollout, policy_mask=OWN.expand_as(rollout.completion_mask))
    with pytest.raises(ValueError, match=r"`policy_mask` must have the shape of `completion_mask`, \(24, 3\), got"):
        replace(rollout, policy_mask=OWN)
