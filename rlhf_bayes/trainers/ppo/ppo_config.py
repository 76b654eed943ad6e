"""Configuration of [`PPOTrainer`]."""

import math
from dataclasses import dataclass, field

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


@dataclass
class PPOConfig(RolloutConfig):
    r"""
    Configuration of [`PPOTrainer`]: that of [`~trl.RLOOConfig`], and the parameters below.

    Parameters:
        kl_estimator (`str`, *optional*, defaults to `"k1"`):
            Per-token KL estimate in the reward, log π(x_t) − log π0(x_t). Others are refused with the reason.
        lam (`float`, *optional*, defaults to `1.0`):
            λ of generalised advantage estimation. With 1 the gradient is unbiased however bad the critic is. Below 1
            the KL of early tokens is felt only through the critic: worth trying with a trained one (`value_model`).
            The discount is 1: another one would move the optimum.
        cliprange_value (`float`, *optional*):
            Clips the value's change from the rollout. Default: not clipped, since the range is in units of the reward,
            which only you know.
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss.
        critic (`str`, *optional*, defaults to `"shared"`):
            `"shared"`: a value head on the policy's last hidden state. `"separate"`: a trunk of its own (a LoRA
            adapter on the same base, where the policy is one).
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps at the start in which only the critic learns.
        target_kl (`float`, *optional*):
            Adapts β so that KL(π‖π0) approaches this many nats per sequence. Default: β is fixed.
        kl_horizon (`int`, *optional*, defaults to `10_000`):
            Episodes over which β adapts.
        missing_eos_penalty (`float`, *optional*):
            Subtracted from the reward of completions without EOS, in units of the reward. Part of the posterior.
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

    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": "Per-token estimate of KL(policy || prior) in the reward. Only 'k1' has the posterior as optimum."
        },
    )
    lam: float = field(
        default=1.0,
        metadata={
            "help": "Lambda of generalised advantage estimation, in [0, 1]. Below 1 the gradient is only as good as "
            "the critic. The discount is 1."
        },
    )
    cliprange_value: float | None = field(
        default=None,
        metadata={
            "help": "Clip range of the value function, in units of the reward. If `None`, no clipping is applied."
        },
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    critic: str = field(
        default="shared",
        metadata={
            "help": "'shared': a value head on the policy's last hidden state. 'separate': a trunk of its own, from "
            "`value_model`, a copy of the reward model, or a LoRA adapter on the policy's base.",
            "choices": ["shared", "separate"],
        },
    )
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps at the start in which only the critic learns."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={"help": "KL(policy || prior) in nats per sequence that beta adapts to. If `None`, beta is fixed."},
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which beta adapts to `target_kl`."})

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
            "critic": (self.critic, ("shared", "separate").__contains__, "'shared' or 'separate'"),
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
        if self.target_kl is not None and self.beta == 0:
            raise ValueError(
                f"`beta` must be positive with `target_kl`={self.target_kl}, got 0: β adapts by factors. Start from, "
                "say, `beta=0.05`."
            )
