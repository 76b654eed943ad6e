"""What the configurations of [`PPOTrainer`] and [`GDCTrainer`] have in common."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl import RLOOConfig

from rlhf_bayes.trainers.faults.fault_config import FaultConfig
from rlhf_bayes.trainers.field_help import document_fields

# keys of `generation_kwargs` that do not change which completions come with which probability
_HARMLESS_GENERATION_KWARGS = {"cache_implementation", "use_cache", "cache_config", "prefill_chunk_size"}
# name -> (value, whether it will do, the rule)
NumberRules = dict[str, tuple[Any, Callable[[Any], bool], str]]


@document_fields
@dataclass
class RolloutConfig(FaultConfig, RLOOConfig):
    """[`~trl.RLOOConfig`] for trainers whose target is a posterior. Not for direct use."""

    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether to disable dropout. Must be True: dropout makes the policy's density random."},
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={
            "help": (
                "Subtracted from the reward of completions without EOS, in units of the reward. It is part of the "
                "posterior: another value moves the optimum. Default: none."
            )
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": (
                "Seconds that one call of a reward function may take. A function that is not async is then called in "
                "a thread of its own. Default: no limit."
            )
        },
    )
    reward_retries: int = field(
        default=0,
        metadata={
            "help": (
                "How often a reward function that raises or exceeds `reward_timeout` is called again, after 1 s, 2 s, "
                "4 s and so on. If every call fails, training saves a checkpoint and stops."
            )
        },
    )

    def __post_init__(self):
        # before TRL divides by `num_generations`
        for name, (value, holds, rule) in self._number_rules().items():
            if value is not None and not holds(value):
                raise ValueError(f"`{name}` must be {rule}, got {value!r}.")
        try:
            super().__post_init__()
        except ValueError as error:
            # RLOO's last check: it needs siblings as a baseline, these objectives do not
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        self._check_faults()
        self._check_posterior()
        self._check_sampling()
        if self.steps_per_generation % self.gradient_accumulation_steps != 0:
            raise ValueError(
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}) must divide "
                f"`steps_per_generation` ({self.steps_per_generation}): the loss is a mean over a whole optimizer "
                f"step, which must all have been drawn. Set "
                f"`steps_per_generation={self.gradient_accumulation_steps}` or a multiple."
            )

    @property
    def infinite_where_forbidden(self) -> str | None:
        """What is minimised, if it is infinite for a policy that can draw a forbidden completion; else None."""
        return None

    def _number_rules(self) -> NumberRules:
        return {
            "missing_eos_penalty": (self.missing_eos_penalty, lambda x: 0 <= x < math.inf, "at least 0, or None"),
            "num_generations": (self.num_generations, lambda x: x >= 1, "at least 1"),
            "num_iterations": (self.num_iterations, lambda x: x >= 1, "at least 1"),
            "max_completion_length": (self.max_completion_length, lambda x: x >= 1, "at least 1 (tokens)"),
            "reward_weights": (self.reward_weights, lambda x: all(map(math.isfinite, x)), "finite"),
            "reward_clip_range": (self.reward_clip_range, lambda x: x[0] < x[1], "(low, high) with low < high"),
            "temperature": (self.temperature, lambda x: 0 < x < math.inf, "positive and finite"),
            "reward_timeout": (self.reward_timeout, lambda x: 0 < x < math.inf, "positive (seconds), or None"),
            "reward_retries": (self.reward_retries, lambda x: x >= 0, "at least 0"),
        }

    def _check_posterior(self) -> None:
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
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"`neftune_noise_alpha` must be None, got {self.neftune_noise_alpha}: with noise in its embeddings "
                "the policy that is scored is another one at each pass, and importance ratios are noise. Remove it."
            )
        if not self.disable_dropout:
            raise ValueError(
                "`disable_dropout` must be True: under dropout the policy that draws, the policy that is scored and "
                "the policy that is trained are three different ones. Remove it."
            )
