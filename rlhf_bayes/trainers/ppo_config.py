"""Configuration of [`PPOTrainer`]."""

import math
from dataclasses import dataclass, field

from trl import RLOOConfig

_KL_ESTIMATORS = {
    "k3": "its optimum is not the posterior: in the reward it penalises KL(π‖π0) − KL(π0‖π) in expectation",
    "k2": "it is biased: in the reward it penalises ½·E[(log π/π0)²], not the KL",
    "exact": (
        "as a reward it loses what k1 has at the optimum, where r − β·log(π/π0) is β·log Z for every completion and "
        "the return has no variance; it ended 3 to 5 times further from the posterior. The exact KL is what is "
        "reported"
    ),
}
# keys of `generation_kwargs` that do not change which completions come with which probability
_HARMLESS_GENERATION_KWARGS = {"cache_implementation", "use_cache", "max_time", "cache_config", "prefill_chunk_size"}


@dataclass
class PPOConfig(RLOOConfig):
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
    """

    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether to disable dropout. Must be True: dropout makes the policy's density random."},
    )
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
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Subtracted from the reward of completions without EOS. Moves the posterior."},
    )

    def __post_init__(self):
        # before TRL divides by `num_generations`
        self._check_numbers()
        try:
            super().__post_init__()
        except ValueError as error:
            # RLOO's last check: it needs siblings as a baseline, a critic does not
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        self._check_posterior()
        self._check_sampling()
        if self.steps_per_generation % self.gradient_accumulation_steps != 0:
            raise ValueError(
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}) must divide "
                f"`steps_per_generation` ({self.steps_per_generation}): the loss is a mean over the tokens of a whole "
                f"optimizer step, which must all have been drawn. Set "
                f"`steps_per_generation={self.gradient_accumulation_steps}` or a multiple."
            )

    def _check_numbers(self) -> None:
        rules = {
            "beta": (self.beta, lambda x: 0 <= x < math.inf, "at least 0 (0 is plain RL)"),
            "lam": (self.lam, lambda x: 0 <= x <= 1, "in [0, 1]"),
            "vf_coef": (self.vf_coef, lambda x: 0 <= x < math.inf, "at least 0"),
            "cliprange_value": (self.cliprange_value, lambda x: 0 < x < math.inf, "positive, or None for no clipping"),
            "critic_warmup_steps": (self.critic_warmup_steps, lambda x: x >= 0, "at least 0"),
            "target_kl": (self.target_kl, lambda x: 0 < x < math.inf, "positive (nats per sequence), or None"),
            "kl_horizon": (self.kl_horizon, lambda x: x >= 1, "at least 1 (episodes)"),
            "missing_eos_penalty": (self.missing_eos_penalty, lambda x: 0 <= x < math.inf, "at least 0, or None"),
            "num_generations": (self.num_generations, lambda x: x >= 1, "at least 1"),
            "num_iterations": (self.num_iterations, lambda x: x >= 1, "at least 1"),
            "max_completion_length": (self.max_completion_length, lambda x: x >= 1, "at least 1 (tokens)"),
            "epsilon": (self.epsilon, lambda x: 0 < x <= 1, "in (0, 1]"),
            "epsilon_high": (self.epsilon_high, lambda x: 0 < x < math.inf, "positive, or None for `epsilon`"),
            "reward_weights": (self.reward_weights, lambda x: all(map(math.isfinite, x)), "finite"),
            "reward_clip_range": (self.reward_clip_range, lambda x: x[0] < x[1], "(low, high) with low < high"),
            "temperature": (self.temperature, lambda x: 0 < x < math.inf, "positive and finite"),
        }
        for name, (value, holds, rule) in rules.items():
            if value is not None and not holds(value):
                raise ValueError(f"`{name}` must be {rule}, got {value}.")
        if self.critic not in ("shared", "separate"):
            raise ValueError(f"`critic` must be 'shared' or 'separate', got {self.critic!r}.")

    def _check_posterior(self) -> None:
        if self.kl_estimator != "k1":
            reason = _KL_ESTIMATORS.get(self.kl_estimator, "it is not known")
            raise ValueError(f"`kl_estimator` must be 'k1', got {self.kl_estimator!r}: {reason}. Leave it at 'k1'.")
        if self.target_kl is not None and self.beta == 0:
            raise ValueError(
                f"`beta` must be positive with `target_kl`={self.target_kl}, got 0: β adapts by factors. Start from, "
                "say, `beta=0.05`."
            )
        if self.mask_truncated_completions:
            raise ValueError(
                "`mask_truncated_completions` must be False: completions cut at `max_completion_length` are ordinary "
                "members of the support, and leaving them out trains towards another distribution. Use "
                "`missing_eos_penalty` to make them unlikely."
            )
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model` must be False: the reference is the prior of the posterior, and moving it moves the "
                "target. Lower `beta` to go further from the prior."
            )

    def _check_sampling(self) -> None:
        neutral = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
        for name, values in neutral.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"`{name}` must be {values[0]}, got {getattr(self, name)}: rollouts would come from another "
                    f"distribution than the policy whose log-probs are trained. Remove `{name}`; `temperature` "
                    "tempers policy and prior alike."
                )
        for name in self.generation_kwargs or {}:
            if name not in _HARMLESS_GENERATION_KWARGS:
                raise ValueError(
                    f"`generation_kwargs` may hold {sorted(_HARMLESS_GENERATION_KWARGS)}, got {name!r}: it may change "
                    "the distribution that rollouts come from. Remove it."
                )
        if not self.disable_dropout:
            raise ValueError(
                "`disable_dropout` must be True: under dropout the policy that draws, the policy that is scored and "
                "the policy that is trained are three different ones. Remove it."
            )
