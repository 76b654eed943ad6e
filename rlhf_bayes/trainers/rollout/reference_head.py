"""The prior's head, where it is the policy's head with other weights."""

from typing import final

from torch import Tensor, nn

from rlhf_bayes.lm.critic import kept_trainable
from rlhf_bayes.lm.forward import base_causal_lm
from rlhf_bayes.trainers.rollout.reference import Reference


def switches_head(reference: Reference, policy: nn.Module) -> bool:
    """Whether policy and prior share a module as their head, whose weights PEFT switches."""
    return reference.module is None and hasattr(base_causal_lm(policy).get_output_embeddings(), "original_module")


@final
class ReferenceHead(nn.Module):
    """
    The prior's state of a head that PEFT switches with the adapter (`modules_to_save`, `trainable_token_indices`).

    Args:
        reference ([`Reference`]): The prior.
        policy (`nn.Module`): The policy, PEFT-wrapped.
        projection (`nn.Module`): Its head.
    """

    def __init__(self, reference: Reference, policy: nn.Module, projection: nn.Module):
        super().__init__()
        self._reference = reference
        self._modules_of_policy = (policy, projection)  # in a tuple, so that they are not submodules of this one

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the prior's head: (N, H) -> (N, V)."""
        policy, projection = self._modules_of_policy
        with kept_trainable(policy), self._reference.active(policy):
            return projection(hidden)
