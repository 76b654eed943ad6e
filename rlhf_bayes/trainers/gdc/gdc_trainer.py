"""Generative distributional control: trains a policy towards any posterior by any f-divergence."""

import logging
import textwrap
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_bayes.likelihoods import Likelihood, combine_rewards, known_bound, known_forbids
from rlhf_bayes.lm.forward import CompletionScores
from rlhf_bayes.numerics import importance_ess
from rlhf_bayes.numerics.dpg import default_baseline, dpg_advantages, dpg_baselines
from rlhf_bayes.numerics.f_divergence import f_divergence_terms
from rlhf_bayes.numerics.log_variance import LogVarianceCentres, log_variance_centres, log_variance_loss
from rlhf_bayes.objectives.gdc_losses import LOG_VARIANCE
from rlhf_bayes.objectives.normalizers import Normalizers
from rlhf_bayes.objectives.posterior_metrics import feature_moments, posterior_metrics, satisfaction, target_metrics
from rlhf_bayes.objectives.proposal import Comparison, Snapshot, check_proposal
from rlhf_bayes.objectives.replay import ReplayBuffer
from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer
from rlhf_bayes.trainers.gdc.gdc_config import GDCConfig
from rlhf_bayes.trainers.gdc.gdc_evidence import check_annealing, check_same_beta, power_of_evidence
from rlhf_bayes.trainers.gdc.prior_samples import PriorSamples, check_prior_samples
from rlhf_bayes.trainers.rollout.checks import check_datasets, check_enough_prompts, config_of
from rlhf_bayes.trainers.rollout.evidence import beta_of, check_evidence, reward_funcs_of
from rlhf_bayes.trainers.rollout.scored_rollout import Rollout
from rlhf_bayes.trainers.rollout.shared_rewards import PolicyBase
from rlhf_bayes.trainers.rollout.withheld_steps import withheld_steps

logger = logging.getLogger(__name__)


class GDCTrainer(RolloutTrainer):
    r"""
    Distributional policy gradients towards a posterior p(x|c) = π0(x|c)·exp(log_likelihood(c, x))/Z(c).

    The evidence is a reward, a condition, or features with given means.

        ∇ D_f(π‖p) = −E_q[π/q · (−f′(π/p) − b) · ∇log π],    forward KL: −E_q[(P/(Z·q) − π/q) · ∇log π]

    for completions drawn from a proposal q, by default the policy itself; or the log-variance loss, half the variance
    of log π − log π0 − log_likelihood over a prompt's completions, drawn from anything.

    A drop-in for [`~trl.RLOOTrainer`]: same constructor, datasets, reward functions, flags and metric names. Z of
    each prompt is pooled over all its completions so far: the target never changes, and each batch's estimate is
    unbiased.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, as in [`~trl.RLOOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Evidence r/β, as in [`PPOTrainer`]. A reward may be `-inf`, for a forbidden completion.
        args ([`GDCConfig`], *optional*):
            Configuration.
        train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
        quantization_config, peft_config, ref_model:
            As in [`PPOTrainer`].
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`], *optional*):
            Evidence in nats, in place of `reward_funcs`: that of any posterior, `posterior.likelihood`. One that
            forbids completions is refused by the divergences that are infinite then: the reverse KL, and `alpha=1`.

    Metrics, besides TRL's: those of [`PPOTrainer`] under `posterior/`, log Z being the pooled one, all of the policy,
    by the weights π/q where something else draws (there without `posterior/importance_ess`); and
    `posterior/forward_kl`, `posterior/tv`, each with its standard error, `posterior/khat`, `posterior/max_weight` (see
    [`target_metrics`]), `posterior/satisfaction` (share of completions that are not forbidden),
    `posterior/moments/<feature>`, `posterior/skipped_prompts` (share of prompts of which every weight was 0);
    `gdc/step_ess` (completions), `gdc/skipped_steps`, `gdc/ratio_ess` (share: importance ratios π/q of the step),
    `gdc/clipped` (share of the pseudo-reward that `max_pseudo_reward` took), `gdc/beta`, `gdc/proposal_replaced`.

    `eval_loss` is the divergence that is minimised, estimated on the policy's own completions.

    Raises:
        ValueError, TypeError: on input that cannot be trained on, before the model is loaded where that is possible.

    Source: Khalifa et al. 2021, arXiv 2012.11635; a Z for each prompt: Korbak et al. 2022, 2112.00791; baselines:
    Korbak et al. 2022, 2206.00761; f-divergences: Go et al. 2023, 2302.08215; α: Kruszewski et al. 2025, 2512.05962;
    log-variance: Richter et al. 2020, 2010.10436, with replay Bartoldson et al. 2025, 2503.18929.
    """

    _tag_names: ClassVar = ["trl", "rlhf_bayes", "gdc"]
    _name = "GDC"
    _paper: ClassVar = {
        "title": "A Distributional Approach to Controlled Text Generation",
        "id": "2012.11635",
        "citation": textwrap.dedent("""\
            @inproceedings{khalifa2021distributional,
                title     = {{A Distributional Approach to Controlled Text Generation}},
                author    = {Muhammad Khalifa and Hady Elsahar and Marc Dymetman},
                year      = 2021,
                booktitle = {International Conference on Learning Representations},
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
        likelihood: Likelihood | None = None,
    ):
        args = config_of(args, GDCConfig, model, "GDC")
        check_datasets(train_dataset=train_dataset, eval_dataset=eval_dataset)
        check_enough_prompts(args, train_dataset)
        check_prior_samples(args.prior_samples, train_dataset)
        check_evidence(args, reward_funcs, likelihood, reward_processing_classes)
        check_annealing(args, beta_of(args, likelihood))
        base = PolicyBase.of(model, peft_config, args.model_init_kwargs)
        reward_funcs = reward_funcs_of(likelihood, reward_funcs, reward_processing_classes, args.device, base)
        self.evidence = None if likelihood is None else reward_funcs[0]
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
        engine = "vLLM" if self.use_vllm else None
        if self.use_transformers_continuous_batching:
            engine = "continuous batching"
        engine = "sharded weights (ZeRO-3, FSDP)" if self.sharded else engine
        check_proposal(args.proposal, args.prior_samples, engine)
        self.normalizers = Normalizers(
            None if likelihood is None else known_bound(likelihood), args.beta_init is not None
        )
        self.replay = ReplayBuffer(
            args.replay_batches, args.replay_sampling, args.seed + self.accelerator.process_index
        )
        self.comparison = Comparison()
        self.proposal = Snapshot(self._plain_policy) if args.proposal == "adaptive" else args.proposal
        if args.prior_samples:
            self.add_callback(PriorSamples(self))
        if args.max_pseudo_reward is not None:
            clip = f"`max_pseudo_reward` = {args.max_pseudo_reward}"
            logger.warning(f"{clip} moves the optimum off the posterior where it takes effect: see `gdc/clipped`.")
        self._forbidden_seen = likelihood is not None and known_forbids(likelihood) is True
        self._skips_step = False

    # From a rollout to the columns of a batch

    def rollout_batch(self, rollout: Rollout) -> dict[str, Tensor]:
        log_policy = rollout.token_log_probs.sum(-1)  # (B,)
        log_prior = rollout.ref_token_log_probs.sum(-1)
        log_likelihood = self._log_likelihood(rollout)
        kls = log_policy - log_prior if rollout.token_kl is None else rollout.token_kl.sum(-1)
        columns = torch.stack([log_policy, log_prior, rollout.log_proposal, log_likelihood, kls], dim=-1)
        everyones = self.accelerator.gather(columns.double())  # (B_global, 5)
        keys = self.accelerator.gather(rollout.prompt_keys)  # (B_global,)
        targets = self._targets(everyones, keys)
        self._report_rollout(rollout, everyones, keys, targets)
        if self.mode == "train" and isinstance(self.proposal, Snapshot):
            self._compare(everyones, targets["log_target"])
        first = self.accelerator.process_index * len(log_policy)
        own = slice(first, first + len(log_policy))
        batch = {
            "prompt_keys": rollout.prompt_keys,
            "log_policy": log_policy,
            "log_prior": log_prior,
            "log_proposal": rollout.log_proposal,
            "log_likelihood": log_likelihood,
            "log_z": targets["log_z"][own],
            "baseline": targets["baseline"][own],
        }
        if self.mode == "eval" and self.args.divergence == LOG_VARIANCE:  # in training: before each optimizer step
            names = ("log_policy", "log_prior", "log_likelihood", "log_z")
            centres = self._centres(*(self.accelerator.gather(batch[name]) for name in names), keys)
            batch |= {"centre": centres.centre[own], "scale": centres.scale[own]}
        return batch

    def _log_likelihood(self, rollout: Rollout) -> Tensor:
        # at the temperature asked for: (B,), nan where no reward function applies
        rewards = combine_rewards(
            rollout.rewards_per_func,
            self.reward_weights,
            self.args.reward_clip_range,
            self.args.missing_eos_penalty,
            rollout.ended,
        )
        return rewards / self.beta

    def _targets(self, columns: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """log p, log Z and baseline of each completion of all processes: (B_global,)."""
        log_policy, log_prior, log_proposal, log_likelihood, _ = columns.unbind(-1)
        training = self.mode == "train"
        if training:
            self.normalizers.retarget(power_of_evidence(self.args, self.beta, self.state))
        log_zs = self.normalizers.estimate(keys, log_prior - log_proposal, log_likelihood, keep=training)
        log_target = self._log_target(log_prior, log_likelihood, log_zs.others)
        if self.args.divergence == LOG_VARIANCE or not training:
            baseline = torch.zeros_like(log_policy)
        else:
            options = (self.args.divergence, self.args.alpha)
            kind = self.args.baseline or default_baseline(*options, self.num_generations)
            baseline = dpg_baselines(log_target, log_policy, log_proposal, keys, *options, kind)
        return {
            "log_target": log_target,
            "log_z": log_zs.others.float(),
            "pooled_log_z": log_zs.pooled,
            "baseline": baseline.float(),
        }

    def _log_target(self, log_prior: Tensor, log_likelihood: Tensor, log_z: Tensor) -> Tensor:
        # without a weight above 0 there is no estimate of Z to divide by
        log_z = torch.where(log_z.isfinite(), log_z, torch.nan)
        return log_prior + self.normalizers.power * log_likelihood - log_z

    def _compare(self, columns: Tensor, log_target: Tensor) -> None:
        self.comparison.add(log_target, columns[:, 0], columns[:, 2])
        better = self.comparison.policy_is_better
        if better:
            self.proposal, self.comparison = Snapshot(self._plain_policy), Comparison()
        self.log_metric("gdc/proposal_replaced", float(better))

    # From a batch to the loss

    def loss_count(self, batch: dict[str, Tensor]) -> Tensor:
        counted = ~batch["log_likelihood"].isnan()
        if self.mode == "eval" and self.args.divergence != LOG_VARIANCE:  # without Z, there is nothing to compare with
            counted &= batch["log_z"].isfinite()
        return counted.sum()

    @property
    def step_is_rollout(self) -> bool:
        return super().step_is_rollout and self.args.replay_batches == 1

    def step_batches(
        self, batches: list[dict[str, Tensor]], new_rollout: list[dict[str, Tensor]] | None
    ) -> list[dict[str, Tensor]]:
        if self.args.replay_batches > 1:
            if new_rollout is not None:
                self.replay.add(new_rollout)
            batches = self.replay.sample([len(batch["prompt_keys"]) for batch in batches])
            for batch in batches:  # Z is known better now
                batch["log_z"] = self.normalizers.log_z(batch["prompt_keys"]).float()
        self._judge_step(batches)
        return self._with_centres(batches) if self.args.divergence == LOG_VARIANCE else batches

    def _with_centres(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        # a prompt's completions may be spread over micro-batches and processes: then its mean takes a pass of its own
        if len(batches) == 1 and self.accelerator.num_processes == 1:
            return batches
        with torch.no_grad(), self.accelerator.autocast():
            log_policy = torch.cat([self.score(self.model, batch).log_probs.sum(-1) for batch in batches])
        names = ("log_prior", "log_likelihood", "log_z")
        local = torch.stack([log_policy, *(torch.cat([batch[name] for batch in batches]) for name in names)], dim=-1)
        columns = self.accelerator.gather(local.float())  # (M_global, 4)
        keys = self.accelerator.gather(torch.cat([batch["prompt_keys"] for batch in batches]))
        centres = self._centres(*columns.unbind(-1), keys)
        first = self.accelerator.process_index * len(log_policy)
        sizes = [len(batch["prompt_keys"]) for batch in batches]
        parts = zip(*(column[first : first + len(log_policy)].split(sizes) for column in centres), strict=True)
        return [
            batch | {"centre": centre, "scale": scale} for batch, (centre, scale) in zip(batches, parts, strict=True)
        ]

    def _centres(self, log_policy: Tensor, log_prior: Tensor, log_likelihood: Tensor, log_z: Tensor, keys: Tensor):
        evidence = self.normalizers.power * log_likelihood
        log_z = log_z if self._forbidden_seen else None
        return log_variance_centres(log_policy, log_prior, evidence, keys, self.args.huber_delta, log_z)

    def _judge_step(self, batches: list[dict[str, Tensor]]) -> None:
        # by the weights p/q of its completions: without any, all that it could do is to leave what was drawn
        names = ("log_prior", "log_likelihood", "log_z", "log_proposal")
        columns = torch.stack([torch.cat([batch[name] for batch in batches]) for name in names], dim=-1)  # (M, 4)
        log_prior, log_likelihood, log_z, log_proposal = self.accelerator.gather(columns.double()).unbind(-1)
        log_weights = self._log_target(log_prior, log_likelihood, log_z) - log_proposal  # (M_global,)
        ess = importance_ess(torch.where(log_weights.isnan(), -torch.inf, log_weights)).item()
        self._skips_step = ess < self.args.ess_min - 1e-6  # one completion alone has an ESS of 1 up to rounding
        self.log_metric("gdc/step_ess", ess)
        self.log_metric("gdc/skipped_steps", float(self._skips_step))

    def rollout_loss(self, scores: CompletionScores | None, batch: dict[str, Tensor]) -> Tensor:
        log_policy = batch["log_policy"] if scores is None else scores.log_probs.sum(-1)  # (B,)
        if self.args.divergence == LOG_VARIANCE:
            loss = self._log_variance(log_policy, batch).sum()
            if scores is None:
                return loss
            self._report_step(scores, batch)
            return loss * (0.0 if self._skips_step else 1.0)
        log_target = self._log_target(batch["log_prior"], batch["log_likelihood"], batch["log_z"])
        options = (self.args.divergence, self.args.alpha)
        if scores is None:
            return f_divergence_terms(log_target - log_policy, *options).nansum()
        advantages, clipped = dpg_advantages(
            log_target, log_policy, batch["log_proposal"], batch["baseline"], *options, self.args.max_pseudo_reward
        )
        self._report_step(scores, batch, clipped, advantages.abs())
        return -(advantages * log_policy).sum() * (0.0 if self._skips_step else 1.0)

    def _log_variance(self, log_policy: Tensor, batch: dict[str, Tensor]) -> Tensor:
        columns = (batch["log_prior"], batch["log_likelihood"], batch["log_z"])
        if "centre" in batch:
            centres = LogVarianceCentres(batch["centre"], batch["scale"])
        else:
            centres = self._centres(log_policy, *columns, batch["prompt_keys"])
        evidence = self.normalizers.power * batch["log_likelihood"]
        options = (self.args.huber_delta, self.args.forbidden_gap)
        return log_variance_loss(log_policy, batch["log_prior"], evidence, centres, *options)

    def training_step(self, model, inputs, num_items_in_batch=None):
        # a gradient of 0 would still move the weights: by momentum and weight decay
        with withheld_steps(self.optimizer, lambda: self._skips_step):  # whether, is known when the batch is at hand
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._skips_step:
            for parameter in self.model.parameters():
                parameter.grad = None
        return loss

    # Metrics

    def _report_rollout(self, rollout: Rollout, columns: Tensor, keys: Tensor, targets: dict[str, Tensor]) -> None:
        log_policy, log_prior, log_proposal, log_likelihood, kls = columns.unbind(-1)
        log_zs = targets["pooled_log_z"]  # (B_global,)
        self._forbidden_seen |= bool((log_likelihood == -torch.inf).any())
        metrics = {"gdc/beta": self.beta / self.normalizers.power}
        metrics["posterior/skipped_prompts"] = (log_zs == -torch.inf).double().mean().item()
        if log_zs.isfinite().any():
            metrics["posterior/log_z"] = log_zs[log_zs.isfinite()].mean().item()
        metrics |= target_metrics(targets["log_target"], log_policy, log_proposal, keys)
        evidence, log_ratios = self.normalizers.power * log_likelihood, log_policy - log_prior
        weights = None
        if self.mode == "train" and self.proposal != "policy":
            weights = (log_policy - log_proposal).exp()
            kls = log_ratios  # the exact KL of each token is that of the policy's own prefixes
        options = (1.0, rollout.num_generations, log_zs, weights)
        metrics |= posterior_metrics(evidence, log_ratios, kls, *options) | self._moments(weights)
        if self._forbidden_seen:
            metrics["posterior/satisfaction"] = satisfaction(log_likelihood, weights)
        for name, value in metrics.items():
            self.log_metric(name, value)

    def _moments(self, weights: Tensor | None) -> dict[str, float]:
        if self.evidence is None or not self.evidence.features:
            return {}
        features = self.evidence.features
        local = torch.stack([values.to(self.accelerator.device) for values in features.values()], dim=-1)  # (B, F)
        return feature_moments(self.accelerator.gather(local).double(), features, weights)

    def _report_step(self, scores: CompletionScores, batch: dict[str, Tensor], *pseudo_rewards: Tensor) -> None:
        # the last: what was clipped of them, and what was kept
        mask = batch["completion_mask"].bool()
        entropy = torch.where(mask, scores.entropy, 0.0)
        ratio = (scores.log_probs.sum(-1) - batch["log_proposal"]).exp()
        columns = (entropy, mask.float(), ratio, ratio.square(), torch.ones_like(ratio), *pseudo_rewards)
        totals = self.step_totals(torch.stack([column.sum() for column in columns]))
        if totals is None:
            return
        entropy, tokens, ratios, squares, rows, *rewards = totals.tolist()
        self.log_metric("entropy", entropy / max(tokens, 1.0))
        self.log_metric("gdc/ratio_ess", ratios**2 / max(squares, 1e-30) / rows)
        if self.args.max_pseudo_reward is not None and rewards:
            self.log_metric("gdc/clipped", rewards[0] / max(sum(rewards), 1e-30))

    # Checkpoints

    def rollout_state(self) -> dict[str, Any]:
        return super().rollout_state() | {
            "normalizers": self.normalizers.state_dict(),
            "replay": self.replay.state_dict(),
            "proposal": self.proposal.weights if isinstance(self.proposal, Snapshot) else self.proposal,
            "comparison": self.comparison.sums,
            "forbidden_seen": self._forbidden_seen,
        }

    def load_rollout_state(self, state: dict[str, Any]) -> None:
        check_same_beta(self.beta, state["beta"])
        super().load_rollout_state(state)
        self.normalizers.load_state_dict(state["normalizers"])
        self.replay.load_state_dict(state["replay"])
        self.comparison.sums = state["comparison"].cpu()
        self.proposal = state["proposal"]
        if not isinstance(self.proposal, str):
            snapshot = Snapshot(self._plain_policy)
            snapshot.weights = state["proposal"]
            self.proposal = snapshot
        self._forbidden_seen = state["forbidden_seen"]
