"""PPO's critic after its training: what training saw, for every kind of critic, and a twist of SMC."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from rlhf_bayes.likelihoods import RewardLikelihood
from rlhf_bayes.lm import Critic, FittedCritic, score_completions
from rlhf_bayes.lm.critic import CRITIC
from rlhf_bayes.rewards import takes_prefixes
from rlhf_bayes.samplers import SMC, CriticValue
from rlhf_bayes.testing import toy_reward

from ..trainers.training import config, trainer
from .enumerated import assert_within, prior_of, seeded, tilted


@pytest.fixture(params=["shared", "separate", "adapter"])
def critic_policy(toy, request):
    """A policy with a critic that has opinions."""
    policy, critic = toy.random_policy(), Critic(32)
    if request.param == "separate":
        critic = Critic(32, backbone=toy.random_policy(seed=5).base_model)
    if request.param == "adapter":
        config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
        policy = get_peft_model(policy, config, adapter_name="policy")
        policy.add_adapter(CRITIC, config)
        critic = Critic(32, adapter=CRITIC)
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    (policy.get_base_model() if request.param == "adapter" else policy).add_module(CRITIC, critic)
    return policy.eval()


def test_a_critic_is_what_training_saw(toy, critic_policy):
    prior, policy = prior_of(toy), prior_of(toy, critic_policy)
    value = CriticValue(policy, prior, beta=0.5)
    prompt, ids = toy.prompts[2], [0, 1, 0]
    padded = [torch.tensor(rows) for rows in (policy.prompt_token_ids([prompt]), [ids])]
    masks = [torch.ones_like(tensor, dtype=torch.bool) for tensor in padded]
    with torch.no_grad():
        scores = score_completions(critic_policy, padded[0], masks[0], padded[1], masks[1])
        ref = score_completions(toy.model, padded[0], masks[0], padded[1], masks[1])
    u = scores.values[0]  # before tokens 0, 1, 2
    log_ratio = (scores.log_probs - ref.log_probs)[0].cumsum(0)
    # of the whole completion, the value before its last token
    expected = torch.stack(
        [u[0] / 0.5, u[1] / 0.5 + log_ratio[0], u[2] / 0.5 + log_ratio[1], u[2] / 0.5 + log_ratio[2]]
    )
    values = value.log_value([prompt] * 4, [[], [0], [0, 1], ids])
    assert_close(values, expected, rtol=1e-4, atol=1e-4)


def test_a_policy_without_a_critic_is_refused(toy):
    with pytest.raises(ValueError, match="`policy` must hold a critic, got a LlamaForCausalLM without one"):
        CriticValue(prior_of(toy), prior_of(toy), beta=0.5)


@takes_prefixes
def reward_of_prefixes(prompts, completions, completion_ids, **kwargs):
    return toy_reward(prompts, completions, completion_ids)


@pytest.fixture(scope="module", params=[True, False], ids=["prefix rewards", "states only"])
def fitted(toy, request, tmp_path_factory):
    """A trained policy, the critic saved beside it, the one in the trainer, and the evidence it needs."""
    folder = tmp_path_factory.mktemp("trained")
    args = config(folder, max_steps=8, learning_rate=0.05, critic="ridge", prefix_rewards=request.param)
    trained = trainer(toy, args, reward_funcs=reward_of_prefixes)
    trained.train()
    trained.save_model(str(folder))
    likelihood = RewardLikelihood(reward_of_prefixes, beta=0.5) if request.param else None
    saved = FittedCritic.from_pretrained(folder / CRITIC)
    return trained.model.eval(), saved, trained.objective.critic, likelihood


def test_a_fitted_critic_is_what_training_saw(toy, fitted):
    model, saved, critic, likelihood = fitted
    policy, prompt, ids = prior_of(toy, model), toy.prompts[2], [0, 1, 0]
    padded = [torch.tensor(rows) for rows in (policy.prompt_token_ids([prompt]), [ids])]
    masks = [torch.ones_like(tensor, dtype=torch.bool) for tensor in padded]
    sequences = padded[0], masks[0], padded[1], masks[1]
    with torch.no_grad():
        scores = score_completions(model, *sequences, with_hidden=True)
        ref = score_completions(toy.model, *sequences)
    log_ratios = scores.log_probs - ref.log_probs  # (1, 3)
    paid = -0.5 * (log_ratios.cumsum(-1) - log_ratios)
    rewards = None
    if likelihood is not None:
        rewards = torch.tensor([[0.0, *(toy_reward([prompt], ["?"], [ids[:t]])[0] for t in (1, 2))]])
        assert rewards.abs().max() > 0.1
    u = critic.forecast(critic.features(scores.hidden[None], rewards, paid))[0]
    assert u.std() > 0.01
    value = CriticValue(policy, prior_of(toy), 0.5, saved, likelihood)
    expected = torch.stack([u[t] / 0.5 + log_ratios[0, :t].sum() for t in range(3)])
    assert_close(value.log_value([prompt] * 3, [[], [0], [0, 1]]), expected, rtol=1e-3, atol=1e-3)


def test_smc_with_a_fitted_critic_is_exact(toy, fitted):
    model, saved, _, likelihood = fitted
    posterior, runs = tilted(toy), 200
    value = CriticValue(prior_of(toy, model), posterior.prior, 0.5, saved, likelihood)
    draws = SMC(value, ess_threshold=0.9).sample(posterior, [toy.prompts[0]] * runs, 8, seeded(1))
    assert max(draws.info["resamplings"]) > 0
    ratio = (draws.log_z.log_z - toy.log_z()[0]).exp()
    assert_within(ratio.mean(), ratio.std() / math.sqrt(runs), 1.0, "Ẑ/Z")


def test_a_fitted_critic_that_does_not_fit_is_refused(toy, fitted):
    model, saved, _, likelihood = fitted
    policy, prior = prior_of(toy, model), prior_of(toy)
    other = FittedCritic(saved.coefficients, hidden_size=16)
    with pytest.raises(ValueError, match=r"`critic` must have been fitted to .* 32 entries, got one for 16"):
        CriticValue(policy, prior, 0.5, other)
    wrong = RewardLikelihood(toy_reward, beta=0.5) if likelihood is None else None
    with pytest.raises(ValueError, match=r"`likelihood` must be (given|None) with this `critic`"):
        CriticValue(policy, prior, 0.5, saved, wrong)
    with pytest.raises(ValueError, match="`likelihood` must be None without `critic`"):
        CriticValue(policy, prior, 0.5, likelihood=RewardLikelihood(toy_reward, beta=0.5))
