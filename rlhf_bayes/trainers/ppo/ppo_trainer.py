"""PPO with an explicit KL penalty to the prior: variational inference towards π*(x) ∝ π0(x)·exp(r(x)/β)."""

import logging
import textwrap
from pathlib import Path
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_bayes.likelihoods import Likelihood
from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.critic import CRITIC, Critic
from rlhf_bayes.objectives import PPOObjective
from rlhf_bayes.objectives.ridge_critic import RidgeCritic
from rlhf_bayes.rewards import RewardModel
from rlhf_bayes.rewards.prefix_rewards import check_can_be_asked
from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer
from rlhf_bayes.trainers.ppo.attach_critic import attach_critic
from rlhf_bayes.trainers.ppo.old_names import OLD_ARGUMENTS, OLD_METHODS, names_successors, said_of
from rlhf_bayes.trainers.ppo.ppo_config import PPOConfig
from rlhf_bayes.trainers.rollout.checks import check_datasets, check_enough_prompts, config_of, of_one_turn
from rlhf_bayes.trainers.rollout.evidence import beta_of, check_evidence, reward_funcs_of
from rlhf_bayes.trainers.rollout.reward_funcs import functions_of_prefixes
from rlhf_bayes.trainers.rollout.shared_rewards import PolicyBase
from rlhf_bayes.trainers.rollout.trainer_world import TrainerWorld

logger = logging.getLogger(__name__)


@names_successors(OLD_ARGUMENTS, "argument")
@of_one_turn
class PPOTrainer(RolloutTrainer):
    r"""
    Proximal policy optimisation of E[r] − β·KL(πθ‖π0).

    The optimum is the posterior π*(x|c) = π0(x|c)·exp(r(c,x)/β)/Z(c).

        J(θ) = E_πθ[r(x) − β·log(πθ(x)/π0(x))]        (Korbak, Perez & Buckley 2022, arXiv 2205.11275, eq. 3–4)
        J/β = ELBO,   log Z − ELBO = KL(πθ‖π*)         (their eq. 5–7)

    A drop-in for [`~trl.RLOOTrainer`]: same constructor, datasets, reward functions, flags and metric names, also for
    vision-language models and prompts with images. The token that stands for images has probability 0 in completions,
    under policy and prior alike, since no model could read it there.

    The token reward is −β·log(πθ/π0) of the token, plus the score at the last token. Advantages come from GAE with
    discount 1: the advantage at t contains the log-ratios from t on, and with an exact critic it is 0 everywhere at
    the optimum. There are four departures from the PPO of Ziegler et al. 2019 (arXiv 1909.08593); each was measured to
    come closer to the posterior (`benchmarks/exact_posterior.py`, `benchmarks/real_posterior.py`):

    - The critic is fitted in closed form after each rollout ([`~rlhf_bayes.objectives.ridge_critic.RidgeCritic`]),
      and reads the rewards of prefixes where the reward functions can be asked for them. λ depends on how much it
      explains. It is saved in the folder `critic` beside the policy ([`~rlhf_bayes.lm.FittedCritic`]), and guides
      decoding by [`~rlhf_bayes.samplers.CriticValue`].
    - The critic forecasts u, the return of the whole completion, and the KL of the prefix is added in closed form:
      V(x_<t) = u(x_<t) + β·Σ_{i<t} log(πθ/π0)(x_i). At the optimum u is the constant β·log Z(c).
    - Advantages are recomputed at each update, with the current policy and critic. This is right since the posterior
      does not move.
    - With several completions per prompt, siblings correct the critic's forecast of the prompt: see
      [`prompt_baseline`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, as in [`~trl.RLOOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Reward functions, sync or async, sequence-classification models or paths to such, as in
            [`~trl.RLOOTrainer`]; a path may also hold an ensemble, and a normalization beside the weights is applied.
            LoRA adapters on the base of a policy with LoRA are scored by that base: no second one is loaded.
            None means "does not apply"; a completion to which none applies is left out of the loss.
        args ([`PPOConfig`], *optional*):
            Configuration.
        train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers:
            As in [`~trl.RLOOTrainer`].
        quantization_config, peft_config:
            As in [`~trl.RLOOTrainer`].
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The prior π0. Default: with PEFT, the base model (adapters off, or the adapter as it was passed); else a
            frozen copy of the policy's weights as passed.
        value_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The initial critic, with `critic="shared"` or `critic="separate"`: a critic saved by this trainer, or, with
            `"separate"`, a model whose trunk is used (it must have the policy's tokenizer). Default: a zero head on
            the policy's trunk; with `"separate"` a LoRA adapter on the policy's base, a copy of the reward model's
            trunk, or a copy of the policy's.
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`], *optional*):
            Evidence in nats instead of `reward_funcs`: that of any posterior, `posterior.likelihood`. It is used as
            the reward with β = 1, so `beta`, `target_kl` and the fields that change rewards must be left out. Evidence
            that forbids completions is refused, since the reverse KL would be infinite.

    Metrics, besides TRL's: `posterior/kl_to_prior`, `posterior/elbo`, `posterior/log_z`, `posterior/gap` (nats per
    sequence), `posterior/gap_standard_error`, `posterior/importance_ess` (see [`posterior_metrics`]);
    `ppo/policy_loss`, `ppo/value_loss` (units of the reward, and squared), `ppo/approx_kl` (nats per token, of the
    update), `ppo/policy_clip_fraction`, `ppo/value_clip_fraction`, `ppo/explained_variance`, `ppo/beta`, `ppo/lam`.

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
        if value_model is not None and args.critic == "ridge":
            raise ValueError(
                "`value_model` must be left out with `critic='ridge'`, which is fitted anew in each run. Leave it "
                "out, or set `critic='shared'` or `critic='separate'`."
            )
        check_datasets(train_dataset=train_dataset, eval_dataset=eval_dataset)
        check_enough_prompts(args, train_dataset)
        check_evidence(args, reward_funcs, likelihood, reward_processing_classes)
        base = PolicyBase.of(model, peft_config, args.model_init_kwargs)
        reward_funcs = reward_funcs_of(likelihood, reward_funcs, reward_processing_classes, args.device, base)
        self.evidence = None if likelihood is None else reward_funcs[0]
        check_can_be_asked(reward_funcs, args.prefix_rewards)
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
        if args.critic == "ridge":
            self.asked_for_prefixes = functions_of_prefixes(self, args.prefix_rewards)
        self.beta = beta_of(args, likelihood)
        self.critic: Critic | None = None
        if args.critic != "ridge":
            models = self._reward_models()
            self.critic = attach_critic(
                self.model, self.text_tokenizer, args.critic, value_model, models, args.seed, self.reads_images
            )
        self.objective = self._make_objective()
        if optimizers[0] is not None:
            # they are added to the last group, since a scheduler made earlier has no learning rate for a new group
            self.optimizer.param_groups[-1]["params"].extend(
                parameter for parameter in self._critic_parameters() if parameter.requires_grad
            )

    def __getattr__(self, name: str):
        # called for names that are no attribute
        if name in OLD_METHODS:
            raise AttributeError(said_of([name], OLD_METHODS, "is no method of PPOTrainer"))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _make_objective(self) -> PPOObjective:
        world = TrainerWorld(self)
        return PPOObjective(
            world,
            beta=self.beta,
            lam=self.args.lam,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            cliprange_value=self.args.cliprange_value,
            vf_coef=self.args.vf_coef,
            normalize_advantages=self.args.normalize_advantages,
            critic_warmup_steps=self.args.critic_warmup_steps,
            target_kl=self.args.target_kl,
            kl_horizon=self.args.kl_horizon,
            critic=RidgeCritic(world) if self.args.critic == "ridge" else None,
        )

    def _reward_models(self) -> list[tuple[nn.Module, PreTrainedTokenizerBase]]:
        # reward models whose trunk the critic may copy: modules, and whole models that were loaded from a path
        models = []
        for func, tokenizer in zip(self.reward_funcs, self.reward_processing_classes, strict=True):
            loaded = getattr(func, "__wrapped__", None)
            if isinstance(func, nn.Module):
                models.append((self.accelerator.unwrap_model(func), tokenizer))
            elif isinstance(loaded, RewardModel) and isinstance(loaded.model, PreTrainedModel):
                models.append((loaded.model, loaded.tokenizer))
        return models

    def training_step(self, model, inputs, num_items_in_batch=None):
        # while only the critic learns, the gradient must not reach a trunk that it shares with the policy
        if self.critic is not None:
            self.critic.detach_trunk = self.objective.critic_warms_up and self.args.critic == "shared"
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.objective.critic_warms_up:
            # gradients are set to None rather than 0, since weight decay moves weights whose gradient is 0
            critic = {id(parameter) for parameter in self._critic_parameters()}
            for parameter in self.model.parameters():
                if id(parameter) not in critic:
                    parameter.grad = None
        return loss

    def _critic_parameters(self) -> list[nn.Parameter]:
        # the critic's own parameters, and those of its adapter in the policy
        return [parameter for name, parameter in self.model.named_parameters() if f".{CRITIC}." in f".{name}"]

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.objective.critic is not None and self.args.should_save:
            size = base_causal_lm(self._plain_policy).config.get_text_config().hidden_size
            fitted = self.objective.critic.fitted(size)
            if fitted is not None:
                fitted.save_pretrained(Path(output_dir or self.args.output_dir) / CRITIC)
