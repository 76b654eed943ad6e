"""What a rollout leaves for an objective to learn from."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """
    One process's completions as they were drawn and scored, before anything is learnt from them.

    Log-probabilities are those of the policy and of the prior at the training temperature, in nats; padding is 0.
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
    """(B,) int64: equal for rows of the data that are equal in every column, and the same in every process and run."""
    token_log_probs: Tensor
    """(B, T): log π(x_t | prefix) under the policy as it is."""
    ref_token_log_probs: Tensor
    """(B, T): log π0(x_t | prefix)."""
    token_entropy: Tensor
    """(B, T): entropy of π(· | prefix)."""
    log_proposal: Tensor
    """(B,): log q(x | prompt) under what drew it; that of the policy, if it did."""
    rewards: Tensor
    """(B,): r, weighted, clipped and less the EOS penalty; nan where no function applies, -inf where forbidden."""
    num_generations: int
    """Completions a prompt; rows of a prompt are neighbours in the batch of all processes."""
    token_kl: Tensor | None = None
    """(B, T): exact KL(π(· | prefix) ‖ π0(· | prefix)); None where FSDP shards the weights."""
    values: Tensor | None = None
    """(B, T): the critic's value of each prefix, where the policy has a critic."""
    drawn_from: Literal["policy", "prior", "snapshot"] = "policy"
    """What drew the completions; a snapshot is the policy as it once was."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """name -> (B,): what the evidence says it is made of, where it says so."""

    @property
    def sequences(self) -> dict[str, Tensor]:
        """The four tensors by which a model scores the completions, by the names of [`Batch`]."""
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        return {name: getattr(self, name) for name in names}
