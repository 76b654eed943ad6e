"""PPO with an explicit KL penalty to the prior: variational inference towards π*(x) ∝ π0(x)·exp(r(x)/β)."""

import logging
import textwrap
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_bayes.likelihoods import Likelihood, combine_rewards
from rlhf_bayes.lm.critic import CRITIC
from rlhf_bayes.lm.forward import CompletionScores
from rlhf_bayes.numerics import k1
from rlhf_bayes.numerics.masked import masked_sum
from rlhf_bayes.numerics.ppo import (
    adapted_beta,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    kl_penalised_advantages,
    prompt_baseline,
)
from rlhf_bayes.objectives.posterior_metrics import posterior_metrics
from rlhf_bayes.rewards import RewardModel
from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer
from rlhf_bayes.trainers.ppo.attach_critic import attach_critic
from rlhf_bayes.trainers.ppo.ppo_config import PPOConfig
from rlhf_bayes.trainers.rollout.checks import check_datasets, check_enough_prompts, config_of
from rlhf_bayes.trainers.rollout.evidence import beta_of, check_evidence, reward_funcs_of
from rlhf_bayes.trainers.rollout.scored_rollout import Rollout
from rlhf_bayes.trainers.rollout.shared_rewards import PolicyBase

logger = logging.getLogger(__name__)


class PPOTrainer(RolloutTrainer):
    r"""
    Proximal policy optimisation of E[r] − β·KL(πθ‖π0).

    The optimum is the posterior π*(x|c) = π0(x|c)·exp(r(c,x)/β)/Z(c).

        J(θ) = E_πθ[r(x) − β·log(πθ(x)/π0(x))]        (Korbak, Perez & Buckley 2022, arXiv 2205.11275, eq. 3–4)
        J/β = ELBO,   log Z − ELBO = KL(πθ‖π*)         (their eq. 5–7)

    A drop-in for [`~trl.RLOOTrainer`]: same constructor, datasets, reward functions, flags and metric names.

    The token reward is −β·log(πθ/π0) of the token, plus the score at the last one; advantages come from GAE with
    discount 1, so the advantage at t holds the log-ratios from t on and is 0 everywhere at the optimum, given an exact
    critic. Three departures from the PPO of Ziegler et al. 2019 (arXiv 1909.08593), each measured to come
    closer to the posterior (`benchmarks/exact_posterior.py`):

    - The critic forecasts the return of the whole completion, u, and the KL already paid is added in closed form:
      V(x_<t) = u(x_<t) + β·Σ_{i<t} log(πθ/π0)(x_i). At the optimum u is the constant β·log Z(c).
    - Advantages are recomputed at each update, with the policy and the critic of that moment: the posterior does not
      move, so completions drawn earlier in the batch are judged by what the policy is now.
    - With several completions per prompt, siblings correct the critic's forecast of the prompt: see
      [`prompt_baseline`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, as in [`~trl.RLOOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Reward functions, sync or async, sequence-classification models or paths to such, as in
            [`~trl.RLOOTrainer`]; a path may also hold an ensemble, and a normalization beside the weights is applied.
            A folder with LoRA adapters on the base of a policy with LoRA is scored by that base: no other is loaded.
            None means "does not apply"; a completion to which none applies is left out of the loss.
        args ([`PPOConfig`], *optional*):
            Configuration.
        train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
        quantization_config, peft_config:
            As in [`~trl.RLOOTrainer`].
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The prior π0. Default: with PEFT, the base model (adapters off, or the adapter as it was passed); else a
            frozen copy of the policy's weights as passed.
        value_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Where the critic starts: a critic saved by this trainer, or, with `critic="separate"`, a model whose trunk
            it takes (same tokenizer as the policy). Default: a zero head on the policy's trunk; with
            `critic="separate"` a LoRA adapter on the policy's base, a copy of the reward model's trunk, or one of the
            policy's.
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`], *optional*):
            Evidence in nats, in place of `reward_funcs`: that of any posterior, `posterior.likelihood`. It is the
            reward, and β is 1, so `beta`, `target_kl` and what shapes rewards are left out. One that forbids
            completions is refused: the reverse KL is infinite then.

    Metrics, besides TRL's: `posterior/kl_to_prior`, `posterior/elbo`, `posterior/log_z`, `posterior/gap` (nats per
    sequence), `posterior/gap_standard_error`, `posterior/importance_ess` (see [`posterior_metrics`]);
    `ppo/policy_loss`, `ppo/value_loss` (units of the reward, and squared), `ppo/approx_kl` (nats per token, of the
    update), `ppo/policy_clip_fraction`, `ppo/value_clip_fraction`, `ppo/explained_variance`, `ppo/beta`.

    Raises:
        ValueError, TypeError: on input that cannot be trained on, before the model is loaded where that is possible.
    """

    _tag_names: ClassVar = ["trl", "rlhf_bayes", "ppo"]
    _name = "PPO"
    _paper: ClassVar = {
        "title": "RL with KL penalties is better viewed as Bayesian inference",
        "id": "2205.11275",
        "citation": textwrap.dedent("""\
            @inproceedings{korbak2022rl,
                title     = {{RL with KL penalties is better viewed as Bayesian inference}},
                author    = {Tomasz Korbak and Ethan Perez and Christopher L. Buckley},
                year      = 2022,
                booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2022},
            }"""),
    }

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        ref_model=None,
        value_model=None,
        likelihood: Likelihood | None = None,
    ):
        args = config_of(args, PPOConfig, model, "PPO")
        if args.critic_warmup_steps and args.weight_decay and args.deepspeed_plugin is not None:
            raise ValueError(
                f"`weight_decay` must be 0 with `critic_warmup_steps` under DeepSpeed, got {args.weight_decay}: its "
                "optimizer would shrink the policy's weights while only the critic learns. Set `weight_decay=0.0`."
            )
        check_datasets(train_dataset=train_dataset, eval_dataset=eval_dataset)
        check_enough_prompts(args, train_dataset)
        check_evidence(args, reward_funcs, likelihood, reward_processing_classes)
        base = PolicyBase.of(model, peft_config, args.model_init_kwargs)
        reward_funcs = reward_funcs_of(likelihood, reward_funcs, reward_processing_classes, args.device, base)
        self.evidence = None if likelihood is None else reward_funcs[0]
        if args.beta == 0:
            logger.warning(
                "`beta` is 0: the optimum is an argmax of the reward, a single completion per prompt, and no "
                "posterior. Expect the entropy to collapse; posterior/elbo, log_z and gap are undefined."
            )
        super().__init__(
            model,
            reward_funcs,
            args,
            ref_model=ref_model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.beta = beta_of(args, likelihood)
        self.critic = attach_critic(
            self.model, self.processing_class, args.critic, value_model, self._reward_models(), args.seed
        )
        if optimizers[0] is not None:
            # into a group that is there: a scheduler made before knows no other
            self.optimizer.param_groups[-1]["params"].extend(
                parameter for parameter in self._critic_parameters() if parameter.requires_grad
            )

    def _reward_models(self) -> list[tuple[nn.Module, PreTrainedTokenizerBase]]:
        # what a critic may take its trunk from: modules, and whole models that were loaded from a path
        models = []
        for func, tokenizer in zip(self.reward_funcs, self.reward_processing_classes, strict=True):
            loaded = getattr(func, "__wrapped__", None)
            if isinstance(func, nn.Module):
                models.append((self.accelerator.unwrap_model(func), tokenizer))
            elif isinstance(loaded, RewardModel) and isinstance(loaded.model, PreTrainedModel):
                models.append((loaded.model, loaded.tokenizer))
        return models

    def rollout_batch(self, rollout: Rollout) -> dict[str, Tensor]:
        rewards = combine_rewards(
            rollout.rewards_per_func,
            self.reward_weights,
            self.args.reward_clip_range,
            self.args.missing_eos_penalty,
            rollout.ended,
        )  # (B,), nan where no reward function applies
        batch = {
            "loss_mask": rollout.mask & ~rewards.isnan()[:, None],
            "rewards": rewards.nan_to_num(0.0),
            "old_token_log_probs": rollout.token_log_probs,
            "ref_token_log_probs": rollout.ref_token_log_probs,
            "old_values": rollout.values,
            "token_entropy": rollout.token_entropy,
            "beta": torch.tensor(self.beta, device=rewards.device),
        }
        batch["value_shift"] = self._value_shift(rollout, rewards)
        advantages, targets = self._advantages(rollout.token_log_probs, rollout.values, batch)
        batch["advantage_shift"], batch["advantage_scale"] = self._whitening(advantages, batch["loss_mask"])
        columns = torch.stack([rollout.values, targets, batch["loss_mask"].float()])  # (3, B, T)
        columns = self.accelerator.pad_across_processes(columns, dim=2).transpose(0, 1)
        everyones_values, everyones_targets, mask = self.accelerator.gather(columns.contiguous()).unbind(1)
        self.log_metric("ppo/explained_variance", explained_variance(everyones_values, everyones_targets, mask.bool()))
        self._report_rollout(rollout, rewards)
        return batch

    def rollout_loss(self, scores: CompletionScores | None, batch: dict[str, Tensor]) -> Tensor:
        mask, old_log_probs = batch["loss_mask"], batch["old_token_log_probs"]  # (B, T)
        if scores is None:
            scores = CompletionScores(old_log_probs, batch["token_entropy"], batch["old_values"], None)
        # with the policy and the critic of now: the target does not depend on who drew the completions
        advantages, targets = self._advantages(scores.log_probs.detach(), scores.values.detach(), batch)
        advantages = (advantages - batch["advantage_shift"]) / batch["advantage_scale"]
        # where before exp: padding is no token of the policy
        log_ratio = torch.where(mask, scores.log_probs - old_log_probs, 0.0)
        policy_loss = clipped_policy_loss(log_ratio, advantages, self.epsilon_low, self.epsilon_high)
        value_loss = clipped_value_loss(scores.values, batch["old_values"], targets, self.args.cliprange_value)
        self._report_update(scores, log_ratio, advantages, policy_loss, value_loss, batch)
        policy_weight = 0.0 if self._critic_warms_up() else 1.0
        return policy_weight * masked_sum(policy_loss, mask) + self.args.vf_coef * masked_sum(value_loss, mask)

    def loss_count(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["loss_mask"].sum()

    def _advantages(self, log_probs: Tensor, values: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        log_ratios = k1(log_probs, batch["ref_token_log_probs"])  # (B, T)
        values = values + batch["value_shift"][:, None]
        return kl_penalised_advantages(
            batch["rewards"], log_ratios, values, batch["loss_mask"], batch["beta"], self.args.lam
        )

    def _value_shift(self, rollout: Rollout, rewards: Tensor) -> Tensor:
        # how much a completion's siblings say that the critic misjudges the prompt (B,)
        log_ratios = k1(rollout.token_log_probs, rollout.ref_token_log_probs).sum(-1)  # (B,)
        forecasts = rollout.values[:, 0]  # (B,): before the first token, a function of the prompt
        returns, everyones = self.accelerator.gather(
            torch.stack([rewards - self.beta * log_ratios, forecasts], dim=-1)
        ).unbind(-1)  # (B_global,)
        baselines = prompt_baseline(returns, everyones, rollout.num_generations)
        first = self.accelerator.process_index * len(rewards)
        return baselines[first : first + len(rewards)] - forecasts

    def training_step(self, model, inputs, num_items_in_batch=None):
        # a shared trunk is the policy's: while only the critic learns, its gradient stops at the head
        self.critic.detach_trunk = self._critic_warms_up() and self.args.critic == "shared"
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._critic_warms_up():
            # weight decay moves weights whose gradient is 0
            critic = {id(parameter) for parameter in self._critic_parameters()}
            for parameter in self.model.parameters():
                if id(parameter) not in critic:
                    parameter.grad = None
        return loss

    def _critic_parameters(self) -> list[nn.Parameter]:
        # the critic's own, and its adapter's in the policy
        return [parameter for name, parameter in self.model.named_parameters() if f".{CRITIC}." in f".{name}"]

    def _critic_warms_up(self) -> bool:
        return self.mode == "train" and self.state.global_step < self.args.critic_warmup_steps

    def _whitening(self, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if not self.args.normalize_advantages:
            return advantages.new_tensor(0.0), advantages.new_tensor(1.0)
        # over the tokens of all processes; the constant is that of RLOO
        local = torch.stack([masked_sum(x, mask) for x in (torch.ones_like(advantages), advantages, advantages**2)])
        count, total, squares = self.accelerator.reduce(local, reduction="sum")
        mean = total / count.clamp(min=1.0)
        return mean, (squares / count.clamp(min=1.0) - mean**2).clamp(min=0.0).sqrt() + 1e-4

    def _report_rollout(self, rollout: Rollout, rewards: Tensor) -> None:
        log_ratios = k1(rollout.token_log_probs, rollout.ref_token_log_probs)  # (B, T), 0 on padding
        kls = log_ratios if rollout.token_kl is None else rollout.token_kl  # (B, T), 0 on padding
        local = torch.stack([rewards, log_ratios.sum(-1), kls.sum(-1)], dim=-1)  # (B, 3)
        rewards, log_ratios, kls = self.accelerator.gather(local).unbind(-1)  # (B_global,)
        for name, value in posterior_metrics(rewards, log_ratios, kls, self.beta, rollout.num_generations).items():
            self.log_metric(name, value)
        self.log_metric("ppo/beta", self.beta)
        if self.mode == "train" and self.args.target_kl is not None:
            self.beta = adapted_beta(self.beta, kls.mean().item(), self.args.target_kl, len(kls), self.args.kl_horizon)

    def _report_update(self, scores, log_ratio, advantages, policy_loss, value_loss, batch) -> None:
        mask = batch["loss_mask"]
        ratio = log_ratio.detach().exp()
        low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
        moved = (scores.values.detach() - batch["old_values"]).abs()
        clip = self.args.cliprange_value
        columns = {
            "entropy": scores.entropy,
            "ppo/policy_loss": policy_loss,
            "ppo/value_loss": value_loss,
            "ppo/approx_kl": ratio - 1 - log_ratio,
            "ppo/value_clip_fraction": torch.zeros_like(moved) if clip is None else (moved > clip).float(),
            "clip_ratio/low_mean": low.float(),
            "clip_ratio/high_mean": high.float(),
            "clip_ratio/region_mean": (low | high).float(),
        }
        sums = [masked_sum(column.detach(), mask) for column in columns.values()] + [mask.sum().float()]
        totals = self.step_totals(torch.stack(sums))
        if totals is None:
            return
        *totals, tokens = totals.tolist()
        for name, total in zip(columns, totals, strict=True):
            self.log_metric(name, total / max(tokens, 1.0))
