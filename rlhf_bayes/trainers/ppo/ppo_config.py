"""Configuration of [`PPOTrainer`]."""

import math
from dataclasses import dataclass, field

from rlhf_bayes.trainers.field_help import document_fields
from rlhf_bayes.trainers.ppo.old_names import OLD_FIELDS, names_successors
from rlhf_bayes.trainers.rollout.rollout_config import NumberRules, RolloutConfig

_KL_ESTIMATORS = {
    "k3": "its optimum is not the posterior: in the reward it penalises KL(π‖π0) − KL(π0‖π) in expectation",
    "k2": "it is biased: in the reward it penalises ½·E[(log π/π0)²], not the KL",
    "exact": (
        "as a reward it loses what k1 has at the optimum, where r − β·log(π/π0) is β·log Z for every completion and "
        "the return has no variance; it ended 3 to 5 times further from the posterior. The exact KL is what is "
        "reported"
    ),
}


@names_successors(OLD_FIELDS, "field")
@document_fields
@dataclass
class PPOConfig(RolloutConfig):
    """Configuration of [`PPOTrainer`]: that of [`~trl.RLOOConfig`], and the parameters below."""

    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": (
                "Per-token estimate of KL(π‖π0) in the reward. Only 'k1', log π(x_t) − log π0(x_t), has the posterior "
                "as its optimum; others are refused with the reason."
            )
        },
    )
    lam: float | None = field(
        default=None,
        metadata={
            "help": (
                "λ of generalised advantage estimation, in [0, 1]. With 1 the gradient is unbiased however bad the "
                "critic is; below 1, the critic's forecast stands for what later tokens earn, which has less noise. "
                "Default: 1 − s/10 with the 'ridge' critic, where s is the share of the variance of the returns that "
                "it has forecast so far; 1 with others. The discount is 1: another one would move the optimum."
            )
        },
    )
    cliprange_value: float | None = field(
        default=None,
        metadata={
            "help": (
                "Clips the change of a value since the rollout to this range, in units of the reward. Default: no "
                "clipping, since only you know the scale of the reward."
            )
        },
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    critic: str = field(
        default="ridge",
        metadata={
            "help": (
                "'ridge': a linear forecast from the policy's last hidden state and from rewards of prefixes, fitted "
                "in closed form after each rollout; it needs no learning rate, and adds no weights to the policy. "
                "'shared': a value head on the policy's last hidden state. 'separate': a trunk of its own, which is "
                "`value_model`, or a LoRA adapter on the policy's base, or a copy of the reward model or of the "
                "policy."
            ),
            "choices": ["ridge", "shared", "separate"],
        },
    )
    prefix_rewards: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether the 'ridge' critic reads the rewards of prefixes: a control variate, which reduces the noise "
                "of the gradient and never moves the optimum. A reward function is then called on every prefix of "
                "each completion; a causal reward model reads all prefixes of a completion in one pass. Default: "
                "causal reward models are asked, and functions marked with `rlhf_bayes.rewards.takes_prefixes`; True "
                "asks all rewards, False none."
            )
        },
    )
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps at the start in which only the critic learns."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={"help": "KL(π‖π0) in nats per sequence towards which β is adapted. Default: β is fixed."},
    )
    kl_horizon: int = field(
        default=10_000, metadata={"help": "Completions over which a KL far from `target_kl` changes β by a fifth."}
    )

    @property
    def infinite_where_forbidden(self) -> str | None:
        """PPO minimises the reverse KL, which is infinite where the evidence forbids what the policy can draw."""
        return "PPO, which minimises the reverse KL"

    def _number_rules(self) -> NumberRules:
        return super()._number_rules() | {
            "beta": (self.beta, lambda x: 0 <= x < math.inf, "at least 0 (0 is plain RL)"),
            "lam": (self.lam, lambda x: 0 <= x <= 1, "in [0, 1]"),
            "vf_coef": (self.vf_coef, lambda x: 0 <= x < math.inf, "at least 0"),
            "cliprange_value": (self.cliprange_value, lambda x: 0 < x < math.inf, "positive, or None for no clipping"),
            "critic_warmup_steps": (self.critic_warmup_steps, lambda x: x >= 0, "at least 0"),
            "critic": (self.critic, ("ridge", "shared", "separate").__contains__, "'ridge', 'shared' or 'separate'"),
            "target_kl": (self.target_kl, lambda x: 0 < x < math.inf, "positive (nats per sequence), or None"),
            "kl_horizon": (self.kl_horizon, lambda x: x >= 1, "at least 1 (episodes)"),
            "epsilon": (self.epsilon, lambda x: 0 < x <= 1, "in (0, 1]"),
            "epsilon_high": (self.epsilon_high, lambda x: 0 < x < math.inf, "positive, or None for `epsilon`"),
        }

    def _check_posterior(self) -> None:
        super()._check_posterior()
        if self.kl_estimator != "k1":
            reason = _KL_ESTIMATORS.get(self.kl_estimator, "it is not known")
            raise ValueError(f"`kl_estimator` must be 'k1', got {self.kl_estimator!r}: {reason}. Leave it at 'k1'.")
        self._check_critic()
        if self.target_kl is not None and self.beta == 0:
            raise ValueError(
                f"`beta` must be positive with `target_kl`={self.target_kl}, got 0: β adapts by factors. Start from, "
                "say, `beta=0.05`."
            )

    def _check_critic(self) -> None:
        if self.critic != "ridge" and self.prefix_rewards:
            raise ValueError(
                f"`prefix_rewards` must be left out with `critic`={self.critic!r}, got True: only the 'ridge' critic "
                "reads them. Set `critic='ridge'`."
            )
        if self.critic != "ridge":
            return
        of_gradient = ("critic_warmup_steps", "vf_coef", "cliprange_value")
        for name in of_gradient:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"`{name}` must be left out with `critic='ridge'`, got {getattr(self, name)}: it belongs to a "
                    "critic that learns by gradient, and this one is fitted in closed form. Leave it out, or set "
                    "`critic='shared'`."
                )
