"""Configuration of [`GDCTrainer`]."""

import math
from dataclasses import dataclass, field

from rlhf_bayes.numerics.dpg import BASELINES
from rlhf_bayes.numerics.f_divergence import divergence_of, names_by_baseline
from rlhf_bayes.objectives.gdc_losses import GDC_LOSSES, infinite_where_forbidden
from rlhf_bayes.trainers.field_help import document_fields
from rlhf_bayes.trainers.rollout.rollout_config import NumberRules, RolloutConfig

_REPLAY_SAMPLING = ("uniform", "recency")
_PROPOSALS = ("policy", "adaptive", "prior")


@document_fields
@dataclass
class GDCConfig(RolloutConfig):
    """Configuration of [`GDCTrainer`]: that of [`~trl.RLOOConfig`], and the parameters below."""

    beta: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": (
                "Units of reward per nat of evidence. Default: 0.05, as in TRL, with `reward_funcs`. With a "
                "`likelihood` leave it out, since that is in nats already."
            )
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "What is minimised, p being the posterior and π the policy. "
            + "; ".join(f"'{name}': {loss.help}" for name, loss in GDC_LOSSES.items())
            + ". The log-variance needs no importance weights, and Z only where completions are forbidden.",
            "choices": list(GDC_LOSSES),
        },
    )
    alpha: float | None = field(
        default=None, metadata={"help": "α of divergence 'alpha', between 0, the forward KL, and 1, the reverse KL."}
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": (
                "What is subtracted from the pseudo-reward. Default: where a prompt has several completions, the one "
                f"with less noise for the divergence, 'leave_one_out' for {names_by_baseline('leave_one_out')}; "
                "otherwise 'constant', which is −f′(1)."
            ),
            "choices": list(BASELINES),
        },
    )
    proposal: str = field(
        default="policy",
        metadata={
            "help": (
                "The distribution that completions are drawn from. 'policy': the policy. 'adaptive': the best policy "
                "so far, which is replaced when the policy's KL(p‖π) is lower by more than noise. 'prior': the prior."
            ),
            "choices": list(_PROPOSALS),
        },
    )
    replay_batches: int = field(
        default=1,
        metadata={
            "help": (
                "How many of the last rollouts, the current one included, an optimizer step draws its completions "
                "from. Rewards and log-probabilities under the prior are stored and never computed twice."
            )
        },
    )
    replay_sampling: str = field(
        default="uniform",
        metadata={
            "help": (
                "How completions are drawn from these rollouts. 'uniform': all alike. 'recency': with a weight that "
                "falls linearly with age."
            ),
            "choices": list(_REPLAY_SAMPLING),
        },
    )
    huber_delta: float | None = field(
        default=None,
        metadata={
            "help": (
                "Deviations count linearly beyond this many nats, instead of by their square. For divergence "
                "'log_variance' only. Default: none."
            )
        },
    )
    forbidden_gap: float = field(
        default=1.0,
        metadata={
            "help": (
                "The loss of a forbidden completion is 0 once the policy's log-probability is this many nats below "
                "the prior's. For divergence 'log_variance' only."
            )
        },
    )
    ess_min: float = field(
        default=1.0,
        metadata={
            "help": (
                "Optimizer steps whose importance weights have an effective sample size below this are skipped and "
                "counted. The default skips steps without any completion that the posterior allows: they could only "
                "push the policy away from what it draws, and out of the support. 0 skips none."
            )
        },
    )
    max_pseudo_reward: float | None = field(
        default=None,
        metadata={
            "help": (
                "Upper bound of the pseudo-reward, which is p/π for the forward KL. It moves the optimum. Default: "
                "none."
            )
        },
    )
    beta_init: float | None = field(
        default=None,
        metadata={
            "help": (
                "Temperature at the start, above `beta`. It is annealed geometrically to `beta` (to 1 with a "
                "likelihood), so that training starts at a posterior close to the prior. Forbidden completions stay "
                "forbidden. Default: no annealing."
            )
        },
    )
    beta_init_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps over which `beta_init` is annealed. Default: half of the training."},
    )
    prior_samples: int = field(
        default=0,
        metadata={
            "help": (
                "Completions that the prior draws for each training prompt before training, for a first estimate of "
                "Z. A multiple of `num_generations`. With `beta_init` Z changes at each step, so only the last 8 "
                "rollouts count."
            )
        },
    )
    actor_weights: str | None = field(
        default=None,
        metadata={
            "help": (
                "A folder through which actors, processes of their own, get the policy's weights. The training then "
                "follows the store that is `train_dataset` as they add to it: see `rlhf-bayes actor`. Default: a "
                "store is read as it is."
            )
        },
    )
    push_steps: int = field(
        default=1, metadata={"help": "Optimizer steps after which actors get new weights. For `actor_weights` only."}
    )
    max_staleness: int = field(
        default=8,
        metadata={
            "help": (
                "How many optimizer steps old the policy may be that drew a completion. Older ones are dropped, and "
                "actors wait rather than run further ahead. At least `push_steps`. For `actor_weights` only."
            )
        },
    )
    actor_timeout: float = field(
        default=600.0,
        metadata={
            "help": (
                "Seconds without a completion of any actor after which the training stops, with a checkpoint. For "
                "`actor_weights` only."
            )
        },
    )

    replay_store: str | None = field(
        default=None,
        metadata={
            "help": (
                "A store of completions, a share of which is learnt from beside the fresh ones: in each rollout, for "
                "some of its prompts completions are read from it, and none is drawn. `train_dataset` may hold only "
                "prompts that it has. To learn from a store alone, pass it as `train_dataset`."
            )
        },
    )
    store_share: float = field(
        default=0.5,
        metadata={
            "help": (
                "The share of the prompts of each rollout whose completions come from `replay_store`. Where the prior "
                "drew these, all completions are weighted as draws of the mixture of policy and prior, otherwise each "
                "by what drew it."
            )
        },
    )

    @property
    def infinite_where_forbidden(self) -> str | None:
        """The divergence, if it is infinite for a policy that can draw a forbidden completion; else None."""
        if not infinite_where_forbidden(self.divergence, self.alpha):
            return None
        alpha = "" if self.alpha is None else f" and `alpha`={self.alpha:g}"
        return f"`divergence`={self.divergence!r}{alpha}"

    def _number_rules(self) -> NumberRules:
        return super()._number_rules() | {
            "beta": (self.beta, lambda x: 0 < x < math.inf, "positive and finite: at 0 there is no posterior"),
            "divergence": (self.divergence, GDC_LOSSES.__contains__, f"one of {', '.join(GDC_LOSSES)}"),
            "baseline": (self.baseline, BASELINES.__contains__, f"one of {', '.join(BASELINES)}, or None"),
            "proposal": (self.proposal, _PROPOSALS.__contains__, f"one of {', '.join(_PROPOSALS)}"),
            "replay_batches": (self.replay_batches, lambda x: x >= 1, "at least 1 (rollouts)"),
            "replay_sampling": (self.replay_sampling, _REPLAY_SAMPLING.__contains__, "'uniform' or 'recency'"),
            "huber_delta": (self.huber_delta, lambda x: 0 < x < math.inf, "positive (nats), or None"),
            "forbidden_gap": (self.forbidden_gap, lambda x: 0 < x < math.inf, "positive and finite (nats)"),
            "ess_min": (self.ess_min, lambda x: 0 <= x < math.inf, "at least 0 (completions)"),
            "max_pseudo_reward": (self.max_pseudo_reward, lambda x: 0 < x < math.inf, "positive, or None"),
            "beta_init": (self.beta_init, lambda x: 0 < x < math.inf, "positive and finite, or None"),
            "beta_init_steps": (self.beta_init_steps, lambda x: x >= 1, "at least 1 (optimizer steps), or None"),
            "store_share": (self.store_share, lambda x: 0 < x < 1, "between 0 and 1, exclusive"),
            "push_steps": (self.push_steps, lambda x: x >= 1, "at least 1 (optimizer steps)"),
            "max_staleness": (self.max_staleness, lambda x: x >= 1, "at least 1 (optimizer steps)"),
            "actor_timeout": (self.actor_timeout, lambda x: x > 0, "positive (seconds)"),
            "prior_samples": (
                self.prior_samples,
                lambda x: x >= 0 and x % max(self.num_generations, 1) == 0,
                f"a multiple of `num_generations` ({self.num_generations})",
            ),
        }

    def _check_posterior(self) -> None:
        super()._check_posterior()
        if GDC_LOSSES[self.divergence].has_pseudo_reward:
            divergence_of(self.divergence, self.alpha)  # refuses an α that does not fit
            self._refuse_for_others(
                "`divergence`='log_variance'", f"with {self.divergence!r}", "huber_delta", "forbidden_gap"
            )
        else:
            self._check_log_variance()
        if self.actor_weights is None:
            self._refuse_for_others("`actor_weights`", "without it", "push_steps", "max_staleness", "actor_timeout")
        elif self.max_staleness < self.push_steps:
            raise ValueError(
                f"`max_staleness` must be at least `push_steps` ({self.push_steps}), got {self.max_staleness}: what "
                "the newest weights draw would be too old before actors get others. Raise it, or push more often."
            )
        if self.baseline == "leave_one_out" and self.num_generations == 1:
            raise ValueError(
                "`num_generations` must be at least 2 with `baseline`='leave_one_out', got 1: there are no others. "
                "Use 'constant'."
            )
        if self.beta_init_steps is not None and self.beta_init is None:
            raise ValueError(f"`beta_init_steps` ({self.beta_init_steps}) is of no use without `beta_init`. Set both.")
        if self.normalize_advantages:
            raise ValueError(
                "`normalize_advantages` must be False: dividing by the spread of a batch weighs batches by how far "
                "they are from the posterior, and subtracting the mean biases the gradient. Remove it."
            )
        unused = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high}
        for name, value in unused.items():
            if value is not None and value != RolloutConfig.__dataclass_fields__[name].default:
                raise ValueError(
                    f"`{name}` must be left out, got {value}: completions of an older policy are weighted by their "
                    "exact importance ratio, not clipped. `ess_min` skips steps that rest on few of them."
                )

    def _check_log_variance(self) -> None:
        if self.num_generations == 1:
            raise ValueError(
                "`num_generations` must be at least 2 with `divergence`='log_variance', got 1: one completion has no "
                "variance. Draw more a prompt."
            )
        values = {"alpha": self.alpha, "baseline": self.baseline, "max_pseudo_reward": self.max_pseudo_reward}
        for name, value in values.items():
            if value is not None:
                raise ValueError(
                    f"`{name}` is of no use with `divergence`='log_variance', got {value}: the loss has no "
                    "pseudo-reward. Leave it out."
                )

    def _refuse_for_others(self, owner: str, instead: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"`{name}` belongs to {owner}, got {getattr(self, name)} {instead}. Leave it out.")


def check_annealing(args: GDCConfig, beta: float) -> None:
    """
    Refuse an annealing that does not start at a posterior closer to the prior.

    Raises:
        ValueError: if `beta_init` is not above β.
    """
    if args.beta_init is not None and args.beta_init <= beta:
        raise ValueError(
            f"`beta_init` must be above `beta` = {beta}, got {args.beta_init}: annealing goes from a posterior nearer "
            "to the prior to the one asked for. Raise it, or leave it out."
        )
