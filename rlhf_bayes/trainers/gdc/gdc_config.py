"""Configuration of [`GDCTrainer`]."""

import math
from dataclasses import dataclass, field

from rlhf_bayes.numerics import DIVERGENCES
from rlhf_bayes.numerics.dpg import BASELINES
from rlhf_bayes.numerics.f_divergence import check_divergence
from rlhf_bayes.trainers.rollout.rollout_config import NumberRules, RolloutConfig

LOG_VARIANCE = "log_variance"
_REPLAY_SAMPLING = ("uniform", "recency")
_PROPOSALS = ("policy", "adaptive", "prior")


@dataclass
class GDCConfig(RolloutConfig):
    r"""
    Configuration of [`GDCTrainer`]: that of [`~trl.RLOOConfig`], and the parameters below.

    Parameters:
        beta (`float`, *optional*):
            Units of reward per nat of evidence. Default: 0.05, TRL's, with `reward_funcs`; a `likelihood` is in nats
            already and takes none.
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            From the posterior p to the policy π: `"forward_kl"` KL(p‖π), `"reverse_kl"` KL(π‖p), `"js"`, `"tv"`,
            `"alpha"`; or `"log_variance"`, the variance of log π − log π0 − log_likelihood over a prompt's
            completions, which needs no importance weights, nor Z unless completions are forbidden.
        alpha (`float`, *optional*):
            α of `"alpha"`, between 0, the forward KL, and 1, the reverse KL.
        baseline (`str`, *optional*):
            Of the pseudo-reward: `"constant"`, `"leave_one_out"` or `"none"`. Default: leave-one-out for the reverse
            KL and TV, the constant −f′(1) for the others, where it has less noise, and for one completion a prompt.
        proposal (`str`, *optional*, defaults to `"policy"`):
            What completions are drawn from: the policy; `"adaptive"`, the policy as it was when its KL(p‖·) was last
            seen to be lower than that of the proposal before, beyond noise; or `"prior"`.
        replay_batches (`int`, *optional*, defaults to `1`):
            How many of the last rollouts an optimizer step draws its completions from, its own included. Rewards and
            prior log-probabilities are stored, never computed twice.
        replay_sampling (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"` over these rollouts, or `"recency"`: with a weight that falls linearly with age.
        huber_delta (`float`, *optional*):
            Deviations beyond so many nats count linearly. For `"log_variance"` alone.
        forbidden_gap (`float`, *optional*, defaults to `1.0`):
            Nats below its prior at which a forbidden completion is let be. For `"log_variance"` alone.
        ess_min (`float`, *optional*, defaults to `1.0`):
            Optimizer steps whose weights p/q have an effective sample size below are skipped and counted. The default
            skips those without any completion that the posterior allows: such a step can only push the policy away
            from what it draws, and leads out of the support. 0 skips none.
        max_pseudo_reward (`float`, *optional*):
            Upper bound of the pseudo-reward, p/π for the forward KL. Default: none. It moves the optimum.
        beta_init (`float`, *optional*):
            Anneals geometrically from this temperature, above `beta`, to `beta` (to 1 for a likelihood): from a
            posterior nearer to the prior. What is forbidden stays so.
        beta_init_steps (`int`, *optional*):
            Optimizer steps of that. Default: half of the training.
        prior_samples (`int`, *optional*, defaults to `0`):
            Completions that the prior draws for each training prompt before training, for a first estimate of Z. A
            multiple of `num_generations`. With `beta_init`, whose Z changes at each step, the last 8 rollouts count.
        reward_timeout (`float`, *optional*):
            Seconds that one call of a reward function may take. A function that is not async is then called in a
            thread of its own. Default: as long as it takes.
        reward_retries (`int`, *optional*, defaults to `0`):
            How often a reward function that raises or takes too long is called again, after 1 s, 2 s, 4 s and so on.
            When nothing helps, training saves a checkpoint and stops.
        max_nonfinite_steps (`int`, *optional*, defaults to `3`):
            An optimizer step whose gradient is not finite is skipped. After so many in a row training saves a
            checkpoint and stops.
        save_on_sigterm (`bool`, *optional*, defaults to `False`):
            Whether SIGTERM, with which schedulers announce that they will kill a job, lets the optimizer step end,
            saves a checkpoint, and ends the process with status 0.
    """

    beta: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Units of reward per nat of evidence. Default: 0.05 with reward functions; none with a likelihood."
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "What is minimised from the posterior to the policy.",
            "choices": [*DIVERGENCES, LOG_VARIANCE],
        },
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Of divergence 'alpha': 0 is the forward KL, 1 the reverse KL."}
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Of the pseudo-reward. Default: 'leave_one_out' for the reverse KL and TV, else 'constant'.",
            "choices": list(BASELINES),
        },
    )
    proposal: str = field(
        default="policy",
        metadata={
            "help": "What completions are drawn from: the policy, the best policy so far ('adaptive'), or the prior.",
            "choices": list(_PROPOSALS),
        },
    )
    replay_batches: int = field(
        default=1, metadata={"help": "Rollouts, the last included, that an optimizer step draws its completions from."}
    )
    replay_sampling: str = field(
        default="uniform",
        metadata={
            "help": "How completions are drawn from the replayed rollouts: all alike, or recent ones more often.",
            "choices": list(_REPLAY_SAMPLING),
        },
    )
    huber_delta: float | None = field(
        default=None,
        metadata={"help": "Nats beyond which a deviation of the log-variance loss counts linearly. Default: none."},
    )
    forbidden_gap: float = field(
        default=1.0,
        metadata={"help": "Nats below its prior at which the log-variance loss lets a forbidden completion be."},
    )
    ess_min: float = field(
        default=1.0,
        metadata={
            "help": "Optimizer steps with a smaller effective sample size of p/q are skipped and counted. 1 skips "
            "those with forbidden completions only."
        },
    )
    max_pseudo_reward: float | None = field(
        default=None, metadata={"help": "Upper bound of the pseudo-reward. It moves the optimum. Default: none."}
    )
    beta_init: float | None = field(
        default=None, metadata={"help": "Temperature, above beta, that is annealed to beta. Default: none."}
    )
    beta_init_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps of the annealing. Default: half of the training."}
    )
    prior_samples: int = field(
        default=0,
        metadata={"help": "Completions of each training prompt from the prior, before training, to estimate Z."},
    )

    @property
    def infinite_where_forbidden(self) -> str | None:
        """The divergence, if it is infinite where the evidence forbids what the policy can draw; else None."""
        if self.divergence == "alpha" and self.alpha == 1:
            return "`divergence`='alpha' and `alpha`=1, the reverse KL"
        return "`divergence`='reverse_kl'" if self.divergence == "reverse_kl" else None

    def _number_rules(self) -> NumberRules:
        divergences = (*DIVERGENCES, LOG_VARIANCE)
        return super()._number_rules() | {
            "beta": (self.beta, lambda x: 0 < x < math.inf, "positive and finite: at 0 there is no posterior"),
            "divergence": (self.divergence, divergences.__contains__, f"one of {', '.join(divergences)}"),
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
            "prior_samples": (
                self.prior_samples,
                lambda x: x >= 0 and x % max(self.num_generations, 1) == 0,
                f"a multiple of `num_generations` ({self.num_generations})",
            ),
        }

    def _check_posterior(self) -> None:
        super()._check_posterior()
        if self.divergence == LOG_VARIANCE:
            self._check_log_variance()
        else:
            check_divergence(self.divergence, self.alpha)
            self._refuse_for_others("huber_delta", "forbidden_gap")
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

    def _refuse_for_others(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"`{name}` belongs to `divergence`='log_variance', got {getattr(self, name)} with "
                    f"{self.divergence!r}. Leave it out."
                )
