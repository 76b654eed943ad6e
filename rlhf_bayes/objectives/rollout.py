"""A rollout: completions and their scores, which an objective learns from."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from rlhf_bayes.lm.model_inputs import RowInputs
from rlhf_bayes.objectives.batch import policy_tokens


@dataclass(frozen=True)
class Rollout:
    """
    The completions of one process, as they were drawn and scored.

    Log-probabilities are those of the policy and of the prior at the training temperature, in nats; padding is 0.

    Where an environment answers between turns of the policy (a tool, a user), its tokens are part of the completion,
    and later tokens are conditioned on them, but the policy does not choose them. A `policy_mask` leaves them out of
    every sum over tokens: the KL, the entropy, log π and log q are those of the policy's own tokens, and PPO's
    objective is E[r] − β·E[Σ_own log(π/π0)].

    Raises:
        ValueError: if `policy_mask` has another shape than `completion_mask`, or a column is not 0 outside of it.
    """

    prompt_ids: Tensor
    """(B, P): token ids of the prompts, padded on the left."""
    prompt_mask: Tensor
    """(B, P): 1 for the tokens of the prompt."""
    completion_ids: Tensor
    """(B, T): token ids of the completions, padded on the right."""
    completion_mask: Tensor
    """(B, T): 1 for the tokens of the completion, the first EOS included."""
    prompt_keys: Tensor
    """(B,) int64: a key of the row of the data, equal for rows with equal columns, in every process and run."""
    token_log_probs: Tensor
    """(B, T): log π(x_t | prefix) under the current policy."""
    ref_token_log_probs: Tensor
    """(B, T): log π0(x_t | prefix). From a store (B, 1): the sum, which is all that is stored."""
    token_entropy: Tensor
    """(B, T): entropy of π(· | prefix)."""
    log_proposal: Tensor
    """(B,): log q(x | prompt) under what drew it, an engine by its own log-probs; of the tokens that it drew."""
    rewards: Tensor
    """(B,): r, weighted, clipped and minus the EOS penalty; nan where no function applies, -inf where forbidden."""
    num_generations: int
    """Completions per prompt. The rows of a prompt are next to each other in the batch of all processes."""
    token_kl: Tensor | None = None
    """(B, T): exact KL(π(· | prefix) ‖ π0(· | prefix)); None where FSDP shards the weights."""
    values: Tensor | None = None
    """(B, T): the critic's value of each prefix, where the policy has a critic."""
    states: Tensor | None = None
    """(B, T, S): what the objective's `states` keeps of the policy's last hidden state before each token."""
    prefix_rewards: Tensor | None = None
    """(B, T): r of the tokens before t, where the reward functions are asked for it; 0 before the first token."""
    drawn_from: Literal["policy", "engine", "prior", "snapshot", "store"] = "policy"
    """What drew the completions. An engine has the policy's weights and other arithmetic, a snapshot is an earlier
    policy, a store holds draws of anything."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """name -> (B,): features of the completions, where the evidence reports them."""
    model_inputs: list[RowInputs] | None = None
    """B mappings: what a vision-language model reads of each prompt besides its tokens; None for other models."""
    policy_mask: Tensor | None = None
    """(B, T): 1 for the tokens that the policy drew, 0 for an environment's (TRL's `tool_mask`); None: it drew all."""

    def __post_init__(self) -> None:
        if self.policy_mask is None:
            return
        if self.policy_mask.shape != self.completion_mask.shape:
            raise ValueError(
                f"`policy_mask` must have the shape of `completion_mask`, {tuple(self.completion_mask.shape)}, got "
                f"{tuple(self.policy_mask.shape)}. Pad it on the right with the completions."
            )
        for name in ("token_log_probs", "ref_token_log_probs", "token_entropy", "token_kl"):
            column = getattr(self, name)
            if column is not None and column[~self.policy_tokens].any():
                raise ValueError(
                    f"`{name}` must be 0 outside `policy_mask`, got other values: sums over tokens would contain the "
                    "environment's. Take `scores.within(policy_mask)`, and `log_proposal` from the same."
                )

    @property
    def policy_tokens(self) -> Tensor:
        """(B, T) bool: the tokens of the completion that the policy drew."""
        return policy_tokens(self.completion_mask, self.policy_mask)

    @property
    def policy_weights(self) -> Tensor | None:
        """(B,): π/q of each completion, with which means over the rows are those of the policy; None where it drew."""
        if self.drawn_from == "policy":
            return None
        return (self.token_log_probs.sum(-1) - self.log_proposal).exp()

    @property
    def sequences(self) -> dict[str, Any]:
        """What a model needs to score the completions, with the names of [`Batch`]."""
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "model_inputs", "policy_mask")
        return {name: getattr(self, name) for name in names}
