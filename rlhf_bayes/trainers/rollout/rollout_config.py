"""The fields that the configurations of [`PPOTrainer`] and [`GDCTrainer`] have in common."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl import RLOOConfig

from rlhf_bayes.lm.engine import MAX_MISMATCH
from rlhf_bayes.trainers.faults.fault_config import FaultConfig
from rlhf_bayes.trainers.field_help import document_fields

logger = logging.getLogger(__name__)

FIRST_RATE = 1e-6  # of a learning rate that is adapted; it is TRL's default
# keys of `generation_kwargs` that do not change the distribution of completions
_HARMLESS_GENERATION_KWARGS = {"cache_implementation", "use_cache", "cache_config", "prefill_chunk_size"}
# name -> (value, whether it is allowed, the rule in words)
NumberRules = dict[str, tuple[Any, Callable[[Any], bool], str]]


@document_fields
@dataclass
class RolloutConfig(FaultConfig, RLOOConfig):
    """[`~trl.RLOOConfig`] for trainers whose target is a posterior. Not for direct use."""

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": (
                "Learning rate at the start. Default: it is adapted, so that an optimizer step moves the policy by a "
                "small share of the way to the posterior; see `adapt_learning_rate`."
            )
        },
    )
    adapt_learning_rate: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether the learning rate is adapted to how far optimizer steps move the policy: by 1 %% of "
                "KL(π‖π*) where a step learns from 64 completions, before the scheduler's decay. "
                "`learning_rate` is then that of the first step. Default: only where `learning_rate` is not given."
            )
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether to disable dropout. Must be True: dropout makes the policy's density random."},
    )
    router_aux_loss_coef: float | None = field(
        default=0.0,
        metadata={
            "help": (
                "Weight of the load-balancing loss of a mixture of experts. Must be 0 or None: the loss would move "
                "the optimum off the posterior. The value in the model's config is not used."
            )
        },
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
    padding_free: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether policy, prior and critic score completions without padding, several sequences in a row: the "
                "same scores and gradients from fewer tokens where lengths differ. Refused for models of which "
                "this is not true, and for images. Generation and reward models pad as before."
            )
        },
    )
    prior_probe: int = field(
        default=0,
        metadata={
            "help": (
                "Completions that the prior draws before training for each prompt of one batch, to print what β asks "
                "for, whether the distance to it can be measured, and which β or how many completions would do. The "
                "training is the same with and without. 0: none. The recipes draw 32."
            )
        },
    )
    max_engine_mismatch: float | None = field(
        default=MAX_MISMATCH,
        metadata={
            "help": (
                "KL from the policy, in nats per sequence, of what vLLM or continuous batching draws, above which "
                "training stops: the engine then holds other weights, or computes so coarsely that hardly a "
                "completion counts (at 3 nats about 1 in 400). Below it, weights correct for the difference, which is "
                "logged as `engine/mismatch`. None: no bound."
            )
        },
    )
    stop_on_collapse: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether to end the training, with a checkpoint and an error, once the policy is certainly worse than "
                "the untrained prior (its ELBO is below the prior's expected evidence), or its entropy is far below "
                "the posterior's. Without it there is one warning of each."
            )
        },
    )
    store: str | None = field(
        default=None,
        metadata={
            "help": (
                "A folder that keeps each rollout: completions, log-probs under prior and proposal, raw rewards. "
                "`GDCTrainer(train_dataset=CompletionStore(folder))` learns from it for any `beta`, and `rlhf-bayes "
                "what-if` and `rlhf-bayes report` read it. Default: rollouts are not kept."
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
        if self.adapt_learning_rate is None:
            self.adapt_learning_rate = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = FIRST_RATE
        # checked first, since TRL divides by `num_generations`
        for name, (value, holds, rule) in self._number_rules().items():
            if value is not None and not holds(value):
                raise ValueError(f"`{name}` must be {rule}, got {value!r}.")
        try:
            super().__post_init__()
        except ValueError as error:
            # RLOO's last check fails for one completion per prompt, which has no siblings; these objectives need none
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        self._check_faults()
        self._check_posterior()
        self._check_sampling()
        self._draw_whole_steps()

    def _draw_whole_steps(self) -> None:
        accumulation, steps = self.gradient_accumulation_steps, self.steps_per_generation
        if steps % accumulation == 0:
            return
        if accumulation % steps != 0:
            divisor, multiple = math.gcd(accumulation, steps), math.lcm(accumulation, steps)
            raise ValueError(
                f"`gradient_accumulation_steps` ({accumulation}) must divide `steps_per_generation` ({steps}) or be a "
                "multiple of it: the loss is a mean over an optimizer step, which must be drawn by one policy. Set "
                f"`gradient_accumulation_steps={divisor}`, or `steps_per_generation={multiple}` without "
                "`generation_batch_size`."
            )
        logger.warning(
            f"`steps_per_generation` is {steps} and taken as {accumulation}, the `gradient_accumulation_steps`: an "
            "optimizer step learns from several rollouts, which the same policy draws and are drawn at once."
        )
        self.steps_per_generation = accumulation
        self.generation_batch_size = self.generation_batch_size * accumulation // steps

    @property
    def infinite_where_forbidden(self) -> str | None:
        """The objective in words, if it is infinite for a policy that can draw a forbidden completion; else None."""
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
            "max_engine_mismatch": (self.max_engine_mismatch, lambda x: x > 0, "positive (nats), or None"),
            "learning_rate": (self.learning_rate, lambda x: 0 <= x < math.inf, "at least 0, or None to adapt it"),
            "prior_probe": (self.prior_probe, lambda x: x >= 0, "at least 0 (completions)"),
            "reward_retries": (self.reward_retries, lambda x: x >= 0, "at least 0"),
        }

    def _check_posterior(self) -> None:
        if self.router_aux_loss_coef:
            raise ValueError(
                f"`router_aux_loss_coef` must be 0 or None, got {self.router_aux_loss_coef}: a load-balancing term "
                "would move the optimum off the posterior. Remove it."
            )
        self.router_aux_loss_coef = 0.0
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
        room = self.vllm_max_model_length
        if self.use_vllm and room is not None and room <= self.max_completion_length:
            raise ValueError(
                f"`vllm_max_model_length` must be at least a prompt plus `max_completion_length` = "
                f"{self.max_completion_length} tokens, got {room}: completions would be cut. Raise it."
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
