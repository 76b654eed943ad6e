"""Generative distributional control: trains a policy towards any posterior by any f-divergence."""

import logging
import textwrap
from typing import Any, ClassVar

from rlhf_bayes.likelihoods import Likelihood, known_bound, known_forbids
from rlhf_bayes.objectives import Batch, FDivergenceObjective, LogVarianceObjective, PosteriorTarget, ReplayBuffer
from rlhf_bayes.objectives.gdc_losses import LOG_VARIANCE
from rlhf_bayes.objectives.proposal import Comparison, Snapshot, check_proposal
from rlhf_bayes.store import CompletionStore
from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer
from rlhf_bayes.trainers.gdc.actor_rollouts import ActorRollouts, WeightsPusher
from rlhf_bayes.trainers.gdc.gdc_config import GDCConfig, check_annealing
from rlhf_bayes.trainers.gdc.prior_samples import PriorSamples, check_prior_samples
from rlhf_bayes.trainers.gdc.store_checks import check_made_by, check_store_training
from rlhf_bayes.trainers.gdc.stored_rollouts import StoredRollouts, stored_rewards
from rlhf_bayes.trainers.gdc.stored_share import StoredShare, check_store_share
from rlhf_bayes.trainers.rollout.checks import check_datasets, check_enough_prompts, config_of, of_one_turn
from rlhf_bayes.trainers.rollout.evidence import beta_of, check_evidence, reward_funcs_of
from rlhf_bayes.trainers.rollout.shared_rewards import PolicyBase
from rlhf_bayes.trainers.rollout.trainer_world import TrainerWorld
from rlhf_bayes.trainers.rollout.withheld_steps import withheld_steps

logger = logging.getLogger(__name__)


@of_one_turn
class GDCTrainer(RolloutTrainer):
    r"""
    Distributional policy gradients towards a posterior p(x|c) = π0(x|c)·exp(log_likelihood(c, x))/Z(c).

    The evidence is a reward, a condition, or features with given means.

        ∇ D_f(π‖p) = −E_q[π/q · (−f′(π/p) − b) · ∇log π],    forward KL: −E_q[(P/(Z·q) − π/q) · ∇log π]

    for completions drawn from a proposal q, by default the policy itself; or the log-variance loss, half the variance
    of log π − log π0 − log_likelihood over a prompt's completions, from any proposal.

    A drop-in for [`~trl.RLOOTrainer`]: same constructor, datasets, reward functions, flags and metric names, images in
    prompts included (see [`PPOTrainer`]). The Z of each prompt is pooled over all its completions so far, since the
    target never changes and each batch's estimate is unbiased.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, as in [`~trl.RLOOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Evidence r/β, as in [`PPOTrainer`]. A reward may be `-inf`, for a forbidden completion.
        args ([`GDCConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or [`~rlhf_bayes.store.CompletionStore`]):
            Prompts, as in [`PPOTrainer`]. Or a store of completions: then nothing is generated, and neither prior nor
            reward is run or kept in memory, since their values are stored. An epoch is one pass over the store.
            `reward_funcs` and `ref_model` may be left out; given ones must be those of the store. With `actor_weights`
            the training follows the store while actors add to it: see [`~rlhf_bayes.store.Actor`].
        eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config:
            As in [`PPOTrainer`].
        peft_config, ref_model:
            As in [`PPOTrainer`].
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`], *optional*):
            Evidence in nats instead of `reward_funcs`: that of any posterior, `posterior.likelihood`. Divergences that
            are infinite where completions are forbidden refuse evidence that forbids some.

    Metrics, besides TRL's: those of [`PPOTrainer`] under `posterior/`, with the pooled log Z. They are of the policy,
    and use the weights π/q if something else draws (then without `posterior/importance_ess`). Further ones are
    `posterior/forward_kl`, `posterior/tv`, each with its standard error, `posterior/khat`, `posterior/max_weight` (see
    [`target_metrics`]), `posterior/satisfaction` (share of completions that are not forbidden),
    `posterior/moments/<feature>`, `posterior/skipped_prompts` (share of prompts whose weights were all 0);
    `gdc/step_ess` (completions), `gdc/skipped_steps`, `gdc/ratio_ess` (share: importance ratios π/q of the step),
    `gdc/clipped` (share of the pseudo-reward that `max_pseudo_reward` cut off), `gdc/beta`, `gdc/proposal_replaced`.
    With actors: `actors/staleness` (steps), `actors/ess` (share), `actors/waiting` (share of time), `actors/dropped`.

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
        self.stored_share: StoredShare | None = None
        self._rows_to_read: list[dict[str, Any]] = []
        store = train_dataset if isinstance(train_dataset, CompletionStore) else None
        made_by = reward_funcs, ref_model
        if store is not None:
            check_store_training(args, store, eval_dataset)
            self.stored = (StoredRollouts if args.actor_weights is None else ActorRollouts)(store, args, likelihood)
            train_dataset, ref_model = self.stored.dataset, None
            reward_funcs = stored_rewards if likelihood is None else reward_funcs
        elif args.actor_weights is not None:
            raise ValueError(
                f"`actor_weights` must be left out without a store as `train_dataset`, got {args.actor_weights!r}: "
                "actors add to a store. Pass the one that they write: `train_dataset=CompletionStore(...)`."
            )
        check_datasets(train_dataset=train_dataset, eval_dataset=eval_dataset)
        check_enough_prompts(args, train_dataset)
        check_prior_samples(args.prior_samples, train_dataset)
        check_evidence(args, reward_funcs, likelihood, reward_processing_classes)
        check_annealing(args, beta_of(args, likelihood))
        if args.replay_store is not None:
            check_store_share(args)
            self.stored_share = StoredShare(args, likelihood, train_dataset)
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
        if store is not None:
            check_made_by(self, store, *made_by, reward_processing_classes)
        engine = "sharded weights (ZeRO-3, FSDP)" if self.sharded else self.engine.name
        check_proposal(args.proposal, args.prior_samples, engine)
        self.objective = self._make_objective(likelihood)
        if self.stored is None:
            self.proposal = Snapshot(self._plain_policy) if args.proposal == "adaptive" else args.proposal
        if self.stored_share is not None:
            self._know_stored(self.stored_share)
        if isinstance(self.stored, ActorRollouts):
            self.add_callback(WeightsPusher(self, self.stored))
        if args.prior_samples:
            self.add_callback(PriorSamples(self))
        if args.max_pseudo_reward is not None:
            clip = f"`max_pseudo_reward` = {args.max_pseudo_reward}"
            logger.warning(f"{clip} moves the optimum off the posterior where it takes effect: see `gdc/clipped`.")

    def _make_objective(self, likelihood: Likelihood | None) -> FDivergenceObjective | LogVarianceObjective:
        args, world = self.args, TrainerWorld(self)
        target = PosteriorTarget(
            world,
            beta=self.beta,
            bound=None if likelihood is None else known_bound(likelihood),
            beta_init=args.beta_init,
            beta_init_steps=args.beta_init_steps,
            forbids=likelihood is not None and known_forbids(likelihood) is True,
            normalizers=None if self.stored is None else self.stored.normalizers(self.beta),
        )
        replay = ReplayBuffer(args.replay_batches, args.replay_sampling, args.seed + self.accelerator.process_index)
        shared: dict[str, Any] = {
            "ess_min": args.ess_min,
            "comparison": Comparison() if args.proposal == "adaptive" else None,
        }
        if args.divergence == LOG_VARIANCE:
            shared |= {"huber_delta": args.huber_delta, "forbidden_gap": args.forbidden_gap}
            return LogVarianceObjective(world, target, replay, **shared)
        return FDivergenceObjective(
            world,
            target,
            replay,
            divergence=args.divergence,
            alpha=args.alpha,
            # the mean of siblings is another for stored completions than for fresh ones
            baseline=args.baseline or (None if args.replay_store is None else "constant"),
            max_pseudo_reward=args.max_pseudo_reward,
            **shared,
        )

    def _know_stored(self, share: StoredShare) -> None:
        share.check_made_by(self)
        draws = share.rollouts.draws
        evidence = share.rollouts.rewards.double() / self.beta
        keys = share.keys[draws.prompt_index]
        self.objective.know_stored(keys, draws.log_prior - draws.log_proposal, evidence)

    @property
    def adds_stored(self) -> bool:
        """Whether a share of the batches comes from a store."""
        return self.stored_share is not None

    def rows_to_draw(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of a rollout for which completions are drawn, and not read from a store."""
        self._rows_to_read = []
        learns = self.mode == "train" and self.proposal == "policy" and not self.alarms.alone
        if self.stored_share is not None and learns:
            inputs, self._rows_to_read = self.stored_share.split(self, inputs)
        return inputs

    def extended(self, batch: Batch) -> Batch:
        """The batch with the completions that are read from a store."""
        if self.stored_share is None or not self._rows_to_read:
            return batch
        rollout = self.stored_share.rollout(self, self._rows_to_read)
        return self.objective.with_stored(batch, rollout, self.stored_share.from_prior)

    def after_rollout(self) -> None:
        """Replace the proposal by the policy, if the policy is closer to the posterior."""
        if self.mode == "eval" or not isinstance(self.proposal, Snapshot):
            return
        better = self.objective.comparison.policy_is_better
        if better:
            self.proposal, self.objective.comparison = Snapshot(self._plain_policy), Comparison()
        self.log_metric("gdc/proposal_replaced", float(better))

    def training_step(self, model, inputs, num_items_in_batch=None):
        # With a gradient of 0, momentum and weight decay would still move the weights. Whether a step is skipped is
        # decided inside of it, when its completions have been drawn, so the optimizer asks at the step.
        with withheld_steps(self.optimizer, lambda: self.step_is_skipped):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.step_is_skipped:
            for parameter in self.model.parameters():
                parameter.grad = None
        return loss

    # Checkpoints

    def rollout_state(self) -> dict[str, Any]:
        """The state of the objective and the proposal, for a checkpoint."""
        proposal = self.proposal.weights if isinstance(self.proposal, Snapshot) else self.proposal
        read = {"actors": self.stored.state_dict()} if isinstance(self.stored, ActorRollouts) else {}
        return super().rollout_state() | {"proposal": proposal} | read

    def load_rollout_state(self, state: dict[str, Any]) -> None:
        """Restore what `rollout_state` returned."""
        super().load_rollout_state(state)
        self.proposal = state["proposal"]
        if isinstance(self.stored, ActorRollouts) and "actors" in state:  # else it was written without actors
            self.stored.load_state_dict(state["actors"])
        if not isinstance(self.proposal, str):
            snapshot = Snapshot(self._plain_policy)
            snapshot.weights = state["proposal"]
            self.proposal = snapshot
