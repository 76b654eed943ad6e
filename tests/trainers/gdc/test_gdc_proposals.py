"""Completions of something else than the policy: of the prior, or of the policy as it was when it was best."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from rlhf_bayes.objectives import LossSums
from rlhf_bayes.objectives.proposal import Comparison, Snapshot
from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer

from ..training import gdc_config, largest_change, logged, trainer, weights

pytestmark = pytest.mark.slow

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2}


@pytest.mark.parametrize("peft", [False, True])
def test_a_snapshot_is_the_policy_as_it_was(toy, peft):
    policy = toy.random_policy(noise=0.0)
    policy = get_peft_model(policy, LORA) if peft else policy
    snapshot = Snapshot(policy)
    assert all(("lora" in name) == peft for name in snapshot.weights)
    with torch.no_grad():
        before = toy.log_probs(policy)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.2
        parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in policy.named_parameters()}
        moved, now = weights(policy), toy.log_probs(policy)
        assert (now - before).abs().max() > 1e-3
    for _ in range(2):
        with snapshot.active(policy):
            assert not torch.is_grad_enabled()
            assert torch.equal(toy.log_probs(policy), before)
        assert torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), snapshot.active(policy):
        1 / 0  # noqa: B018
    for name, parameter in policy.named_parameters():  # the same objects with the same memory, for the optimizer
        assert parameter is parameters[name][0]
        assert parameter.data_ptr() == parameters[name][1]
        assert torch.equal(parameter, moved[name])


def compare(toy, policy, proposal, target, n, seed=0):
    """A comparison by n completions of each prompt from the proposal; all given as (P, N) log-probabilities."""
    index = torch.multinomial(proposal.exp(), n, replacement=True, generator=torch.Generator().manual_seed(seed))
    comparison = Comparison()
    comparison.add(*(x.gather(1, index).flatten() for x in (target, policy, proposal)))
    return comparison


@torch.no_grad()
def test_only_a_policy_that_is_closer_beyond_noise_is_better(toy):
    target, prior = toy.log_posterior(), toy.log_prior
    closer = (0.9 * prior + 0.1 * target).log_softmax(-1)
    further = (1.1 * prior - 0.1 * target).log_softmax(-1)
    assert compare(toy, closer, prior, target, 2000).policy_is_better
    assert not compare(toy, further, prior, target, 2000).policy_is_better
    assert not compare(toy, prior, prior, target, 2000).policy_is_better
    assert not compare(toy, target, prior, target, 2).policy_is_better  # however good, by a handful of draws
    assert not Comparison().policy_is_better
    # of equal policies, noise alone calls few better
    other = (prior + 0.05 * torch.randn(prior.shape, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    gain = (target.exp() * (other - prior)).sum(-1).mean()
    equal = [compare(toy, other, prior, target, 100, seed).policy_is_better for seed in range(200)]
    assert abs(gain) < 0.02
    assert sum(equal) < 20


@torch.no_grad()
def test_the_comparison_is_the_difference_of_divergences(toy):
    target, prior, policy = toy.log_posterior(), toy.log_prior, toy.log_probs(toy.random_policy(0.02, seed=3))
    comparison = compare(toy, policy, prior, target, 20_000)
    w, w2, wd, w2d, w2d2 = comparison.sums.tolist()
    mean = wd / w
    se = math.sqrt(w2d2 - 2 * mean * w2d + mean**2 * w2) / w
    expected = (target.exp() * (prior - policy)).sum(-1).mean().item()  # KL(p‖π) − KL(p‖π0)
    assert abs(mean - expected) < 4.5 * se
    assert abs(expected) > 4.5 * se
    # completions that are left out, or forbidden, add no weight
    comparison.add(torch.tensor([torch.nan, -math.inf]), torch.zeros(2), torch.zeros(2))
    assert comparison.sums.tolist() == [w, w2, wd, w2d, w2d2]


@pytest.mark.parametrize("peft", [False, True])
def test_the_prior_draws(toy, tmp_path, peft):
    policy = toy.random_policy(noise=0.0 if peft else 0.05, seed=3)
    arguments = {"peft_config": LORA} if peft else {"ref_model": toy.random_policy(0.0)}
    trained = trainer(toy, gdc_config(tmp_path, max_steps=3, proposal="prior", **ADAM), policy, **arguments)
    trained.train()
    for rollout in trained.rollouts:
        assert torch.equal(rollout.log_proposal, rollout.ref_token_log_probs.sum(-1))
    assert not torch.equal(trained.rollouts[2].log_proposal, trained.rollouts[2].token_log_probs.sum(-1))
    assert max(logged(trained, "gdc/ratio_ess")) <= 1
    # TRL's own rewards are of the prior's completions, the same whatever is learnt
    drawn = torch.cat([rollout.log_proposal.exp() for rollout in trained.rollouts])
    known = toy.log_prior.exp().flatten()
    assert (drawn[:, None] - known).abs().min(-1).values.max() < 1e-4


@pytest.mark.parametrize("peft", [False, True])
def test_the_adaptive_proposal_is_replaced_when_the_policy_is_better(toy, tmp_path, peft):
    sizes = {"per_device_train_batch_size": 192, "num_generations": 64, "max_steps": 12}
    args = gdc_config(tmp_path, proposal="adaptive", **sizes, **ADAM | ({"learning_rate": 5e-2} if peft else {}))
    trained = trainer(toy, args, peft_config=LORA if peft else None)
    start = Snapshot(trained._plain_policy).weights
    recorded = []
    compare = trained.after_rollout

    def compared():
        proposal = trained.proposal
        compare()
        recorded.append(trained.proposal is not proposal)

    trained.after_rollout = compared
    trained.train()
    replaced = logged(trained, "gdc/proposal_replaced")
    assert recorded == [value == 1.0 for value in replaced]
    assert 1 <= sum(replaced) < 12
    first = replaced.index(1.0)
    for step, rollout in enumerate(trained.rollouts):
        own = torch.allclose(rollout.log_proposal, rollout.token_log_probs.sum(-1), atol=1e-5)
        prior = torch.allclose(rollout.log_proposal, rollout.ref_token_log_probs.sum(-1), atol=1e-5)
        assert prior == (step <= first)  # the first proposal is the policy before it has learnt
        if step > 0 and not recorded[step - 1]:
            assert not own
        # the step after a replacement is taken by the policy one step on
    assert largest_change(start, trained.proposal.weights) > 1e-4
    kept = logged(trained, "posterior/forward_kl")
    assert kept[-1] < 0.7 * kept[0]


def test_a_policy_that_gets_worse_never_draws(toy, tmp_path):
    """Ascent in place of descent: the proposal stays the first."""
    sizes = {"per_device_train_batch_size": 96, "num_generations": 32}
    args = gdc_config(tmp_path, proposal="adaptive", max_steps=8, learning_rate=3e-3, **sizes)
    trained = trainer(toy, args)
    descent = trained.objective.loss

    def ascent(scores, batch):
        loss, sums = descent(scores, batch)
        return LossSums(-loss, sums)

    trained.objective.loss = ascent
    first = trained.proposal
    trained.train()
    assert trained.proposal is first
    assert logged(trained, "gdc/proposal_replaced") == [0.0] * 8
    with torch.no_grad():
        assert toy.forward_kl(trained.model).mean() > 2 * toy.forward_kl(toy.model).mean()


@pytest.mark.parametrize("proposal", ["adaptive", "prior"])
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("use_vllm", "vLLM"),
        ("use_transformers_continuous_batching", "continuous batching"),
        ("sharded", r"sharded weights \(ZeRO-3, FSDP\)"),
    ],
)
def test_engines_that_draw_from_the_policy_only_are_refused(toy, tmp_path, proposal, engine, name, monkeypatch):
    initialise = RolloutTrainer.__init__

    def with_engine(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if engine != "sharded":
            monkeypatch.setattr(self, engine, True)

    monkeypatch.setattr(RolloutTrainer, "__init__", with_engine)
    if engine == "sharded":
        monkeypatch.setattr(RolloutTrainer, "sharded", True)
    with pytest.raises(ValueError, match=f"`proposal` must be 'policy' with {name}, got '{proposal}'"):
        trainer(toy, gdc_config(tmp_path, proposal=proposal))
    with pytest.raises(ValueError, match=f"`prior_samples` must be 0 with {name}, got 8"):
        trainer(toy, gdc_config(tmp_path, prior_samples=8))
    trainer(toy, gdc_config(tmp_path, proposal="policy"))


def test_weights_outside_of_the_snapshot_are_those_of_now(toy, tmp_path):
    """Nothing of a proposal is left in the policy that is saved or evaluated."""
    trained = trainer(toy, gdc_config(tmp_path, proposal="adaptive", max_steps=3, **ADAM))
    trained.train()
    with torch.no_grad():
        before = toy.log_probs(trained.model)
        with trained.proposal.active(trained.model):
            other = toy.log_probs(trained.model)
        assert_close(toy.log_probs(trained.model), before, rtol=0, atol=0)
    assert (other - before).abs().max() > 1e-3


def test_completions_of_the_prior_may_be_forbidden_by_surprise(toy, tmp_path):
    """By a reward that no one knew to forbid anything, and without the metrics of the policy's own completions."""

    def reward(completion_ids, **kwargs):
        return [-math.inf if ids[0] == 0 else 0.0 for ids in completion_ids]

    changes = {"divergence": "log_variance", "proposal": "prior", "max_steps": 2}
    trained = trainer(toy, gdc_config(tmp_path, **changes), reward_funcs=reward)
    trained.train()
    assert trained.state.global_step == 2
