"""Generative distributional control: trains a policy towards any posterior by any f-divergence."""

import logging
import textwrap
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..likelihoods import Likelihood, combine_rewards, known_bound
from ..lm import CompletionScores
from ..numerics import (
    LogVarianceCentres,
    dpg_advantages,
    dpg_baselines,
    f_divergence_terms,
    importance_ess,
    log_variance_centres,
    log_variance_loss,
)
from ._trl import Rollout, RolloutTrainer
from .checks import check_datasets
from .gdc_config import LOG_VARIANCE, GDCConfig
from .metrics import posterior_metrics, target_metrics
from .normalizers import Normalizers
from .proposal import Comparison, Snapshot
from .replay import ReplayBuffer
from .reward_funcs import LikelihoodReward, checked_reward_funcs, forbids

logger = logging.getLogger(__name__)

_DEFAULT_BETA = 0.05  # TRL's


class GDCTrainer(RolloutTrainer):
    r"""
    Distributional policy gradients towards a posterior p(x|c) = π0(x|c)·exp(log_likelihood(c, x))/Z(c), whatever the
    evidence: a reward, a condition, features with given means.

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
            Evidence in nats, in place of `reward_funcs`: that of any posterior, `posterior.likelihood`.

    Metrics, besides TRL's: those of [`PPOTrainer`] under `posterior/`, log Z being the pooled one; and
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
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = GDCConfig(f"{name.split('/')[-1]}-GDC")
        if not isinstance(args, GDCConfig):
            raise TypeError(
                f"`args` must be a GDCConfig, got {type(args).__name__}. Replace the class name; every field of "
                "RLOOConfig is one of GDCConfig."
            )
        check_datasets(train_dataset=train_dataset, eval_dataset=eval_dataset)
        _check_evidence(reward_funcs, likelihood, args)
        self.evidence = None if likelihood is None else LikelihoodReward(likelihood)
        if self.evidence is None:
            funcs = checked_reward_funcs(reward_funcs, reward_processing_classes, args.device, allow_forbidden=True)
        else:
            funcs = [self.evidence]
        quantization = {} if quantization_config is None else {"quantization_config": quantization_config}
        super().__init__(
            model,
            funcs,
            args,
            ref_model=ref_model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            **quantization,
        )
        self.beta = 1.0 if likelihood is not None else _DEFAULT_BETA if args.beta is None else args.beta
        _check_annealing(args, self.beta)
        self._check_proposal()
        self.normalizers = Normalizers(
            None if likelihood is None else known_bound(likelihood), args.beta_init is not None
        )
        self.replay = ReplayBuffer(
            args.replay_batches, args.replay_sampling, args.seed + self.accelerator.process_index
        )
        self.comparison = Comparison()
        self.proposal = args.proposal
        self._forbidden_seen = likelihood is not None and forbids(likelihood)
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
        return {
            "prompt_keys": rollout.prompt_keys,
            "log_policy": log_policy,
            "log_prior": log_prior,
            "log_proposal": rollout.log_proposal,
            "log_likelihood": log_likelihood,
            "log_z": targets["log_z"][own],
            "baseline": targets["baseline"][own],
            "token_entropy": rollout.token_entropy,
        }

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
            if isinstance(self.proposal, str) and self.proposal == "adaptive":
                self.proposal = Snapshot(self._unwrapped_policy())
            self.normalizers.retarget(self._power())
        log_zs = self.normalizers.estimate(keys, log_prior - log_proposal, log_likelihood, keep=training)
        log_target = self._log_target(log_prior, log_likelihood, log_zs.others)
        if self.args.divergence == LOG_VARIANCE:
            baseline = torch.zeros_like(log_policy)
        else:
            kind = self.args.baseline or ("leave_one_out" if self.args.divergence == "reverse_kl" else "constant")
            options = (self.args.divergence, self.args.alpha, kind)
            baseline = dpg_baselines(log_target, log_policy, log_proposal, keys, *options)
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

    def _power(self) -> float:
        # of the evidence, β/β_t: the posterior of the temperature β_t
        if self.args.beta_init is None:
            return 1.0
        steps = self.args.beta_init_steps or max(1, self.state.max_steps // 2)
        progress = min(1.0, self.state.global_step / steps)
        return (self.beta / self.args.beta_init) ** (1.0 - progress)

    def _compare(self, columns: Tensor, log_target: Tensor) -> None:
        self.comparison.add(log_target, columns[:, 0], columns[:, 2])
        better = self.comparison.policy_is_better
        if better:
            self.proposal, self.comparison = Snapshot(self._unwrapped_policy()), Comparison()
        self.log_metric("gdc/proposal_replaced", float(better))

    # From a batch to the loss

    def loss_count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(float(len(batch["prompt_keys"])), device=batch["prompt_keys"].device)

    def step_batches(
        self, batches: list[dict[str, Tensor]], new_rollout: list[dict[str, Tensor]] | None
    ) -> list[dict[str, Tensor]]:
        if self.args.replay_batches > 1:
            if new_rollout is not None:
                self.replay.add(new_rollout)
            sizes = [len(batch["prompt_keys"]) for batch in batches]
            rows = self.replay.sample(sum(sizes))
            if self.args.divergence != LOG_VARIANCE:
                rows["log_z"] = self.normalizers.log_z(rows["prompt_keys"]).float()
            parts = {name: tensor.split(sizes) for name, tensor in rows.items()}
            batches = [{name: parts[name][index] for name in parts} for index in range(len(sizes))]
        if self.args.divergence == LOG_VARIANCE:
            return self._with_centres(batches)
        self._judge_step(batches)
        return batches

    def _with_centres(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        # a prompt's completions may be spread over micro-batches and processes: then its mean takes a pass of its own
        if len(batches) == 1 and self.accelerator.num_processes == 1:
            return batches
        with torch.no_grad(), self.accelerator.autocast():
            log_policy = torch.cat([self.score(self.model, batch).log_probs.sum(-1) for batch in batches])
        names = ("log_prior", "log_likelihood")
        local = torch.stack([log_policy, *(torch.cat([batch[name] for batch in batches]) for name in names)], dim=-1)
        columns = self.accelerator.gather(local.float())  # (M_global, 3)
        keys = self.accelerator.gather(torch.cat([batch["prompt_keys"] for batch in batches]))
        centres = self._centres(*columns.unbind(-1), keys)
        first = self.accelerator.process_index * len(log_policy)
        sizes = [len(batch["prompt_keys"]) for batch in batches]
        parts = zip(*(column[first : first + len(log_policy)].split(sizes) for column in centres), strict=True)
        return [
            batch | {"centre": centre, "scale": scale} for batch, (centre, scale) in zip(batches, parts, strict=True)
        ]

    def _centres(self, log_policy: Tensor, log_prior: Tensor, log_likelihood: Tensor, keys: Tensor):
        evidence = self.normalizers.power * log_likelihood
        options = (self.args.huber_delta, self.args.forbidden_gap)
        return log_variance_centres(log_policy, log_prior, evidence, keys, *options)

    def _judge_step(self, batches: list[dict[str, Tensor]]) -> None:
        # by the weights p/q that its gradient rests on
        names = ("log_prior", "log_likelihood", "log_z", "log_proposal")
        columns = torch.stack([torch.cat([batch[name] for batch in batches]) for name in names], dim=-1)  # (M, 4)
        log_prior, log_likelihood, log_z, log_proposal = self.accelerator.gather(columns.double()).unbind(-1)
        log_weights = self._log_target(log_prior, log_likelihood, log_z) - log_proposal  # (M_global,)
        ess = importance_ess(torch.where(log_weights.isnan(), -torch.inf, log_weights)).item()
        self._skips_step = ess < self.args.ess_min
        self.log_metric("gdc/step_ess", ess)
        self.log_metric("gdc/skipped_steps", float(self._skips_step))

    def rollout_loss(self, scores: CompletionScores | None, batch: dict[str, Tensor]) -> Tensor:
        log_policy = batch["log_policy"] if scores is None else scores.log_probs.sum(-1)  # (B,)
        if self.args.divergence == LOG_VARIANCE:
            return self._log_variance(log_policy, batch).sum()
        log_target = self._log_target(batch["log_prior"], batch["log_likelihood"], batch["log_z"])
        options = (self.args.divergence, self.args.alpha)
        if scores is None:
            return f_divergence_terms(log_target - log_policy, *options).nansum()
        advantages, clipped = dpg_advantages(
            log_target, log_policy, batch["log_proposal"], batch["baseline"], *options, self.args.max_pseudo_reward
        )
        self._report_step(scores, batch, log_policy.detach() - batch["log_proposal"], advantages, clipped)
        return -(advantages * log_policy).sum() * (0.0 if self._skips_step else 1.0)

    def _log_variance(self, log_policy: Tensor, batch: dict[str, Tensor]) -> Tensor:
        columns = (batch["log_prior"], batch["log_likelihood"])
        if "centre" in batch:
            centres = LogVarianceCentres(batch["centre"], batch["scale"])
        else:
            centres = self._centres(log_policy, *columns, batch["prompt_keys"])
        evidence = self.normalizers.power * batch["log_likelihood"]
        options = (self.args.huber_delta, self.args.forbidden_gap)
        return log_variance_loss(log_policy, batch["log_prior"], evidence, centres, *options)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._skips_step:
            # a gradient of 0 would still move the weights: by momentum and weight decay
            for parameter in self.model.parameters():
                parameter.grad = None
        return loss

    # Metrics

    def _report_rollout(self, rollout: Rollout, columns: Tensor, keys: Tensor, targets: dict[str, Tensor]) -> None:
        log_policy, log_prior, log_proposal, log_likelihood, kls = columns.unbind(-1)
        evidence = self.normalizers.power * log_likelihood
        metrics = target_metrics(targets["log_target"], log_policy, log_proposal, keys)
        if self.mode == "eval" or self.proposal == "policy":
            metrics |= posterior_metrics(
                evidence, log_policy - log_prior, kls, 1.0, rollout.num_generations, targets["pooled_log_z"]
            )
            metrics |= self._moments(log_likelihood)
        else:
            known = targets["pooled_log_z"].isfinite()
            if known.any():
                metrics["posterior/log_z"] = targets["pooled_log_z"][known].mean().item()
        metrics["posterior/skipped_prompts"] = (targets["pooled_log_z"] == -torch.inf).double().mean().item()
        metrics["gdc/beta"] = self.beta / self.normalizers.power
        for name, value in metrics.items():
            self.log_metric(name, value)

    def _moments(self, log_likelihood: Tensor) -> dict[str, float]:
        metrics = {}
        forbidden = log_likelihood == -torch.inf
        self._forbidden_seen |= bool(forbidden.any())
        if self._forbidden_seen:
            scored = (~log_likelihood.isnan()).sum().clamp(min=1)
            metrics["posterior/satisfaction"] = 1.0 - (forbidden.sum() / scored).item()
        if self.evidence is not None and self.evidence.features:
            local = torch.stack(list(self.evidence.features.values()), dim=-1).to(log_likelihood.device)  # (B, F)
            means = self.accelerator.gather(local).double().mean(0)  # (F,)
            for name, mean in zip(self.evidence.features, means.tolist(), strict=True):
                metrics[f"posterior/moments/{name}"] = mean
        return metrics

    def _report_step(
        self,
        scores: CompletionScores,
        batch: dict[str, Tensor],
        log_ratio: Tensor,
        advantages: Tensor,
        clipped: Tensor,
    ) -> None:
        mask = batch["completion_mask"].bool()
        local = torch.stack(
            [
                torch.where(mask, scores.entropy.detach(), 0.0).sum(),
                mask.sum().float(),
                log_ratio.exp().sum(),
                (2 * log_ratio).exp().sum(),
                torch.tensor(float(len(log_ratio)), device=log_ratio.device),
                clipped.sum(),
                (advantages + clipped).abs().sum(),
            ]
        )
        entropy, tokens, ratios, squares, rows, lost, total = self.accelerator.reduce(local, reduction="sum").tolist()
        self.log_metric("entropy", entropy / max(tokens, 1.0))
        self.log_metric("gdc/ratio_ess", ratios**2 / max(squares, 1e-30) / rows)
        if self.args.max_pseudo_reward is not None:
            self.log_metric("gdc/clipped", lost / max(total, 1e-30))

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
        super().load_rollout_state(state)
        self.normalizers.load_state_dict(state["normalizers"])
        self.replay.load_state_dict(state["replay"])
        self.comparison.sums = state["comparison"].cpu()
        self.proposal = state["proposal"]
        if not isinstance(self.proposal, str):
            snapshot = Snapshot(self._unwrapped_policy())
            snapshot.weights = state["proposal"]
            self.proposal = snapshot
        self._forbidden_seen = state["forbidden_seen"]

    # Set-up

    def _unwrapped_policy(self):
        return self.accelerator.unwrap_model(self.model)

    def _check_proposal(self) -> None:
        if self.args.proposal == "policy":
            return
        engine = (
            "vLLM" if self.use_vllm else "continuous batching" if self.use_transformers_continuous_batching else None
        )
        if engine is not None or self.sharded:
            raise ValueError(
                f"`proposal` must be 'policy' with {engine or 'sharded weights (ZeRO-3, FSDP)'}, got "
                f"{self.args.proposal!r}: completions can be drawn from the policy only. Leave it out."
            )


def _check_evidence(reward_funcs: Any, likelihood: Any, args: GDCConfig) -> None:
    if (likelihood is None) == (reward_funcs is None):
        got = "neither" if likelihood is None else "both"
        raise ValueError(
            f"One of `reward_funcs` and `likelihood` must be given, got {got}. A likelihood is the whole evidence; to "
            "add a reward to it, use `posterior.tilt(reward_funcs, beta).likelihood`."
        )
    if likelihood is None:
        return
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"`likelihood` must have a method `log_likelihood`, got {type(likelihood).__name__}. Pass "
            "`posterior.likelihood`, or rewards as `reward_funcs`."
        )
    for name in ("beta", "reward_weights", "reward_clip_range", "missing_eos_penalty"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"`{name}` must be left out with `likelihood`, got {getattr(args, name)}: it belongs to rewards, and "
                "a likelihood is in nats. Say it where the posterior is made."
            )
    infinite = args.divergence == "reverse_kl" or (args.divergence == "alpha" and args.alpha == 1)
    if infinite and forbids(likelihood):
        raise ValueError(
            f"`divergence` must not be {args.divergence!r}{' with `alpha`=1' if args.alpha == 1 else ''} for a "
            "likelihood that forbids completions: KL(π‖p) is infinite for any policy that can draw one, and so is its "
            "gradient. Use 'forward_kl', 'js', 'tv', 'alpha' below 1, or 'log_variance'."
        )


def _check_annealing(args: GDCConfig, beta: float) -> None:
    if args.beta_init is not None and args.beta_init <= beta:
        raise ValueError(
            f"`beta_init` must be above `beta` = {beta}, got {args.beta_init}: annealing goes from a posterior nearer "
            "to the prior to the one asked for. Raise it, or leave it out."
        )
