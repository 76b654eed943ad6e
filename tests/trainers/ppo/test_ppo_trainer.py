"""What PPO optimises: the posterior is its fixed point, its gradient that of the ELBO, and it gets there."""

import math
import re

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import TrainerCallback

from rlhf_bayes import PPOConfig, PPOTrainer
from rlhf_bayes.testing import EnumerableLM, toy_reward

from ...gradients import assert_mean_gradient
from ..training import (
    Recorder,
    config,
    largest_change,
    logged,
    prompts_of,
    table_reward,
    trainer,
    weights,
)

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Seeded(TrainerCallback):
    """The same draws whatever was initialised before."""

    def on_train_begin(self, args, state, control, **kwargs):
        torch.manual_seed(0)


@pytest.mark.parametrize("critic", ["ridge", "shared", "separate"])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_at_the_posterior_nothing_moves(toy, tmp_path, critic, lam):
    policy = toy.random_policy(noise=0.1, seed=5)
    # the policy is the posterior of this reward, with log Z = 0, which a new critic knows
    table = toy.beta * (toy.log_probs(policy).detach() - toy.log_prior)
    assert table.abs().max() > 0.1
    recorder = Recorder()
    value_loss = {} if critic == "ridge" else {"vf_coef": 1.0}
    trained = trainer(
        toy,
        config(tmp_path, max_steps=2, learning_rate=1.0, critic=critic, lam=lam, **value_loss),
        policy,
        table_reward(toy, table),
        ref_model=toy.random_policy(noise=0.0),
        callbacks=[recorder],
    )
    before = weights(trained.model)
    trained.train()
    # rounding, which differs between processors; evidence that is off by 1 % gives 2e-3
    assert max(gradient.abs().max() for step in recorder.gradients for gradient in step.values()) < 1e-4
    assert max(largest_change(before, weights(trained.model), critic=kind) for kind in (True, False)) < 2e-4
    for name, value in (("elbo", 0.0), ("log_z", 0.0), ("gap", 0.0), ("importance_ess", 8.0)):
        assert logged(trained, f"posterior/{name}") == pytest.approx([value] * 2, abs=1e-4)
    assert min(logged(trained, "posterior/kl_to_prior")) > 0.01


def gradient_samples(toy, tmp_path, policy, steps, **changes):
    """Per optimizer step: an unbiased estimate of minus the gradient of J, by parameter name; weights stand still."""
    lengths = []

    def reward(prompts, completions, completion_ids, **kwargs):
        lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
        return toy_reward(prompts, completions, completion_ids)

    recorder = Recorder()
    defaults = {"max_steps": steps, "learning_rate": 0.0, "lam": 1.0, "logging_strategy": "no"}
    sizes = {"per_device_train_batch_size": 96, "num_generations": 32, "temperature": toy.temperature}
    args = config(tmp_path, **defaults | sizes | changes)
    ref_model = toy.random_policy(noise=0.0)
    trainer(toy, args, policy, reward, ref_model=ref_model, callbacks=[recorder]).train()
    # the loss is a mean over tokens, J one over completions
    return [
        {name: gradient * length for name, gradient in step.items() if "critic" not in name}
        for step, length in zip(recorder.gradients, lengths, strict=True)
    ]


@pytest.mark.slow
def test_the_expected_gradient_is_that_of_the_objective(tmp_path):
    toy = EnumerableLM(vocab_size=4, max_completion_length=3, temperature=2.0)
    assert len({len(prompt.split()) for prompt in toy.prompts}) == 3  # padded on the left
    policy = toy.random_policy(noise=0.1, seed=2)
    exact = toy.objective_gradient(policy)
    samples = gradient_samples(toy, tmp_path, policy, steps=60)
    flat = -torch.stack([torch.cat([step[name].flatten() for name in exact]) for step in samples])  # (steps, D)
    expected = torch.cat([gradient.flatten() for gradient in exact.values()])  # (D,)
    assert_mean_gradient(flat, expected, limit=4.5)


def test_the_first_advantages_are_the_returns(toy, tmp_path):
    policy = toy.random_policy(noise=0.1, seed=2)
    args = config(tmp_path, lam=1.0, num_generations=1)
    several = prompts_of(toy, 8)
    trained = trainer(toy, args, policy, ref_model=toy.random_policy(noise=0.0), train_dataset=several)
    trained.train()
    rollout = trained.rollouts[0]
    log_ratios = rollout.token_log_probs - rollout.ref_token_log_probs
    assert log_ratios[rollout.completion_mask.bool()].abs().min() > 1e-4
    loss = logged(trained, "ppo/policy_loss")[0]
    # a new critic says that the whole completion's return is 0, what is already paid included
    advantages = (rollout.rewards[:, None] - 0.5 * log_ratios.sum(-1, keepdim=True)).expand_as(log_ratios)  # (B, T)
    assert loss == pytest.approx(-advantages[rollout.completion_mask.bool()].mean().item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["ridge", "shared", "separate"])
def test_it_learns_the_posterior(toy, tmp_path, critic):
    before = toy.reverse_kl(toy.model).mean().item()
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}
    sizes = {"per_device_train_batch_size": 48, "num_generations": 16, "num_iterations": 2}
    trained = trainer(toy, config(tmp_path, max_steps=80, critic=critic, logging_steps=10, **changes, **sizes))
    trained.train()
    after = toy.reverse_kl(trained.model).mean().item()
    assert before > 1.0
    assert after < 0.1 * before, f"{before} to {after} nats"
    gaps = logged(trained, "posterior/gap")
    assert gaps[-1] < 0.7 * gaps[0]
    assert logged(trained, "posterior/elbo")[-1] > logged(trained, "posterior/elbo")[0]


@pytest.mark.slow
def test_micro_batches_do_not_matter(toy, tmp_path):
    """1 × 24, 8 × 3 and 24 × 1 rows an optimizer step, of different lengths, some without a reward."""

    def reward(prompts, completions, completion_ids, **kwargs):
        rewards = toy_reward(prompts, completions, completion_ids)
        return [None if row in (3, 11) else reward for row, reward in enumerate(rewards)]

    after = []
    for rows, accumulation in ((24, 1), (3, 8), (1, 24)):
        changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        args = config(tmp_path, max_steps=4, num_iterations=2, target_kl=0.1, kl_horizon=50, **changes)
        trained = trainer(toy, args, reward_funcs=reward)
        trained.train()
        assert len({int(length) for length in trained.rollouts[0].completion_mask.sum(-1)}) > 1
        after.append((weights(trained.model), trained.beta, trained.state.log_history[0]))
    for other, beta, log in after[1:]:
        assert_close(other, after[0][0], rtol=1e-4, atol=1e-5)
        assert beta == pytest.approx(after[0][1])
        for name in ("posterior/gap", "posterior/elbo", "kl", "reward"):
            assert log[name] == pytest.approx(after[0][2][name], abs=1e-5), name
    assert largest_change(weights(toy.random_policy(0.0)), {**after[0][0]}) > 1e-3


@pytest.mark.parametrize("normalize", [True, False])
def test_several_optimizer_steps_a_rollout_use_its_old_log_probs(toy, tmp_path, normalize):
    changes = {"steps_per_generation": 3, "per_device_train_batch_size": 8, "num_iterations": 2}
    args = config(tmp_path, max_steps=12, learning_rate=0.5, normalize_advantages=normalize, **changes)
    trained = trainer(toy, args)
    trained.train()
    assert len(trained.rollouts) == 2
    moved = logged(trained, "ppo/approx_kl")
    assert moved[0] == pytest.approx(0.0, abs=1e-6)  # on policy
    assert min(moved[1:6]) > 1e-6
    assert moved[6] == pytest.approx(0.0, abs=1e-6)  # a new rollout
    assert max(logged(trained, "clip_ratio/region_mean")) > 0


def test_lora_at_zero_scores_as_full_fine_tuning(toy, tmp_path):
    rollouts = []
    for arguments in ({}, {"peft_config": LORA}, {"peft_config": LORA, "critic": "separate"}):
        args = config(tmp_path, critic=arguments.pop("critic", "shared"))
        trained = trainer(toy, args, callbacks=[Seeded()], **arguments)
        trained.train()
        rollouts.append(trained.rollouts[0])
    for other in rollouts[1:]:
        assert torch.equal(other.completion_mask, rollouts[0].completion_mask)
        for name in ("token_log_probs", "ref_token_log_probs", "token_entropy", "token_kl", "rewards"):
            assert_close(getattr(other, name), getattr(rollouts[0], name), rtol=1e-5, atol=1e-5)


def exact_kl(toy, policy):
    log_prob = toy.log_probs(policy).detach()
    return (log_prob.exp() * (log_prob - toy.log_prior)).sum(-1), log_prob


def test_evaluation_reports_the_kl_of_the_policy(toy, tmp_path):
    policy = toy.random_policy(noise=0.05, seed=2)
    kl, log_prob = exact_kl(toy, policy)
    args = config(tmp_path, per_device_eval_batch_size=384, num_generations_eval=128)
    trained = trainer(toy, args, policy, ref_model=toy.random_policy(noise=0.0), eval_dataset=prompts_of(toy, 8))
    before = weights(trained.model)
    metrics = trained.evaluate()
    n = 3 * 8 * 128
    log_ratios = log_prob - toy.log_prior
    k1_variance = ((log_prob.exp() * log_ratios**2).sum(-1) - kl**2).mean()
    rao_blackwell = torch.cat([rollout.token_kl.sum(-1) for rollout in trained.rollouts])
    assert len(rao_blackwell) == n
    assert rao_blackwell.var() < 0.5 * k1_variance
    assert (rao_blackwell >= 0).all()
    se = rao_blackwell.std().item() / math.sqrt(n)
    assert abs(metrics["eval_posterior/kl_to_prior"] - kl.mean().item()) < 4.5 * se
    ess = metrics["eval_posterior/importance_ess"]
    assert abs(metrics["eval_posterior/log_z"] - toy.log_z().mean().item()) < 5 * math.sqrt(1 / ess / 24) + 1 / ess
    evidence = toy.log_likelihood + toy.log_prior - log_prob
    elbo_se = ((log_prob.exp() * evidence**2).sum(-1) - toy.elbo(policy) ** 2).mean().div(n).sqrt().item()
    assert abs(metrics["eval_posterior/elbo"] - toy.elbo(policy).mean().item()) < 4.5 * elbo_se
    assert largest_change(before, weights(trained.model)) == 0
    assert trained.model.training is False
    trained.train()  # and training goes on as if nothing had been evaluated
    assert "ppo/policy_loss" in trained.state.log_history[-2]


def test_the_reported_kl_is_never_negative(toy, tmp_path):
    # so near the prior that the sample mean of log-ratios often is
    policy = toy.random_policy(noise=1e-3, seed=2)
    trained = trainer(toy, config(tmp_path, learning_rate=0.0, max_steps=6), policy, ref_model=toy.random_policy(0.0))
    trained.train()
    assert min(logged(trained, "posterior/kl_to_prior")) >= 0
    assert min(logged(trained, "kl")) < 0


def test_without_beta_it_warns_and_trains(toy, tmp_path, caplog):
    trained = trainer(toy, config(tmp_path, beta=0.0, max_steps=3, learning_rate=0.3))
    assert "`beta` is 0: the optimum is an argmax of the reward" in caplog.text
    start = weights(trained.model)
    trained.train()
    assert largest_change(start, weights(trained.model)) > 1e-4
    history = trained.state.log_history[0]
    assert "posterior/kl_to_prior" in history
    assert not {"posterior/elbo", "posterior/log_z", "posterior/gap"} & set(history)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("peft", [True, False])
def test_in_the_warm_up_only_the_critic_learns(toy, tmp_path, critic, peft):
    snapshots = []

    class Snapshots(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            snapshots.append(weights(model))

    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "critic": critic}
    args = config(tmp_path, max_steps=4, critic_warmup_steps=2, **changes)
    trained = trainer(toy, args, callbacks=[Snapshots()], peft_config=LORA if peft else None)
    start = weights(trained.model)
    trained.train()
    for snapshot in snapshots[:2]:
        assert largest_change(start, snapshot, critic=False) == 0
        assert largest_change(start, snapshot, critic=True) > 0
    assert largest_change(start, snapshots[3], critic=False) > 0


def test_weight_decay_waits_for_the_end_of_the_warm_up(toy, tmp_path):
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1}
    trained = trainer(toy, config(tmp_path, max_steps=2, critic="shared", critic_warmup_steps=2, **changes))
    start = weights(trained.model)
    trained.train()
    assert largest_change(start, weights(trained.model), critic=False) == 0


def test_beta_adapts_to_the_target(toy, tmp_path):
    policy = toy.random_policy(noise=0.1, seed=2)
    betas = []
    for target in (1e-3, 50.0):
        args = config(tmp_path, max_steps=3, learning_rate=0.0, target_kl=target, kl_horizon=240)
        trained = trainer(toy, args, policy, ref_model=toy.random_policy(0.0))
        trained.train()
        betas.append(logged(trained, "ppo/beta"))
        factor = 1 + math.copysign(0.2 * 24 / 240, 1 - target)
        assert betas[-1] == pytest.approx([0.5 * factor**step for step in range(3)])
        assert trained.beta == pytest.approx(0.5 * factor**3)
        assert trained.args.beta == 0.5


def test_it_is_a_drop_in_for_rloo(toy, tmp_path):
    # the two-line change, with everything else left to its default
    folder = toy.save(tmp_path / "model")
    args = PPOConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_steps=1, disable_tqdm=True,
        max_completion_length=3, per_device_train_batch_size=4, num_generations=2, save_strategy="no",
    )  # fmt: skip
    trained = PPOTrainer(model=folder, reward_funcs=toy_reward, args=args, train_dataset=prompts_of(toy))
    assert trained.train().global_step == 1
    trained.save_model()
    trained.create_model_card(model_name="out")  # as transformers calls it
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"began as `{tmp_path.name}/model`, trained by PPO" in card
    assert "exp(r/β) of the reward `toy_reward`, β = 0.05" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(code, scope := {})
    text = scope["output"][0]["generated_text"]
    assert text.startswith(toy.prompts[0])
    assert len(text) > len(toy.prompts[0])


def test_arguments_of_another_class_are_refused(toy, tmp_path):
    with pytest.raises(TypeError, match=r"`args` must be a PPOConfig, got dict\. Replace the class name"):
        trainer(toy, {"output_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="`train_dataset` must have a column `prompt`"):
        trainer(toy, config(tmp_path), train_dataset=prompts_of(toy).rename_column("prompt", "text"))
    with pytest.raises(ValueError, match="`eval_dataset` must hold at least one prompt"):
        trainer(toy, config(tmp_path), eval_dataset=prompts_of(toy).select([]))


def test_a_critic_warms_up_under_deepspeed_without_weight_decay(toy, tmp_path):
    args = config(tmp_path, critic="shared", critic_warmup_steps=2, weight_decay=0.1)
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match=r"`weight_decay` must be 0 .* under DeepSpeed, got 0\.1"):
        trainer(toy, args, "some/path/that/is/not/reached")
