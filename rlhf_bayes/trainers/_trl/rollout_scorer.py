"""How a rollout trainer scores completions: under policy and prior, and under what drew them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from rlhf_bayes.lm import score_completions
from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.forward import scatter
from rlhf_bayes.lm.head import LMHead
from rlhf_bayes.lm.model_inputs import RowInputs
from rlhf_bayes.trainers._trl.engines import graph_kept, plain, whole_heads
from rlhf_bayes.trainers.rollout.images import check_reads_images
from rlhf_bayes.trainers.rollout.in_flight import RolloutInFlight
from rlhf_bayes.trainers.rollout.reference_head import ReferenceHead, switches_head
from rlhf_bayes.trainers.rollout.scored_rollout import score_under_both

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer


@final
class RolloutScorer:
    """
    Scores the rows of a rollout. Called with some rows, it returns their columns.

    Args:
        trainer (`RolloutTrainer`):
            Holds the policy, the prior and the proposal.
        in_flight ([`RolloutInFlight`]):
            The rollout. It keeps the policy's graph where the first step learns by the same forward.
    """

    def __init__(self, trainer: "RolloutTrainer", in_flight: RolloutInFlight):
        self.trainer, self.in_flight = trainer, in_flight

    @torch.no_grad()
    def __call__(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        mask: Tensor,
        model_inputs: Sequence[RowInputs] | None = None,
    ) -> dict[str, Tensor | None]:
        """
        Columns of the scores, by the names of [`~rlhf_bayes.objectives.Rollout`].

        Args:
            prompt_ids, prompt_mask (`Tensor` (B, P)):
                Prompts, padded on the left.
            completion_ids, mask (`Tensor` (B, T)):
                Completions, padded on the right.
            model_inputs (`Sequence[RowInputs]`, *optional*):
                Inputs of the B prompts besides their tokens.
        """
        trainer = self.trainer
        sequences = (prompt_ids, prompt_mask, completion_ids, mask, trainer.temperature)
        switched = switches_head(trainer.reference, trainer._plain_policy)
        # a pass backward through a head that is switched meanwhile would find the other one
        learns = trainer.mode == "train" and trainer.step_is_rollout and not switched
        with trainer.accelerator.autocast():
            policy, ref_token_log_probs, token_kl = score_under_both(
                trainer.model,
                trainer.reference,
                sequences,
                # a head that FSDP shards can be used only inside the model's forward
                heads=None if trainer.is_fsdp_enabled else self._heads,
                graph=graph_kept(trainer.model, trainer.args) if learns else None,
                with_hidden=trainer.objective.states is not None,
                model_inputs=model_inputs,
            )
            if learns:
                self.in_flight.graph = policy._replace(hidden=None)
            scored = {
                "token_log_probs": policy.log_probs.detach(),
                "ref_token_log_probs": ref_token_log_probs,
                "token_entropy": policy.entropy,
                "token_kl": token_kl,
                "values": None if policy.values is None else policy.values.detach(),
                "states": self._states(policy.hidden, mask),
            }
            return scored | {"log_proposal": self._log_proposal(sequences, scored, model_inputs)}

    def _states(self, hidden: Tensor | None, mask: Tensor) -> Tensor | None:
        """What the objective reads of the hidden states, (N, H) of the valid tokens: (B, T, S)."""
        keep = self.trainer.objective.states
        return None if keep is None or hidden is None else scatter(keep(hidden.detach()), mask)

    def _log_proposal(
        self, sequences: tuple, scored: dict[str, Tensor | None], model_inputs: Sequence[RowInputs] | None
    ) -> Tensor:
        """log q of each completion, (B,), nats."""
        if self.trainer.drawn_from == "prior":
            return scored["ref_token_log_probs"].sum(-1)
        if self.trainer.drawn_from == "snapshot":
            with self.trainer.drawing():
                options = {"with_values": False, "model_inputs": model_inputs}
                return score_completions(self.trainer.model, *sequences, **options).log_probs.sum(-1)
        return scored["token_log_probs"].sum(-1)

    @contextmanager
    def _heads(self, ref_model: nn.Module) -> Iterator[list[LMHead]]:
        """A context that yields the output projections of policy and prior."""
        trainer = self.trainer
        lms = [base_causal_lm(plain(module, trainer.accelerator)) for module in (trainer.model, ref_model)]
        with whole_heads(lms, trainer.accelerator):
            heads = [LMHead.of(lm, trainer.temperature) for lm in lms]
            if switches_head(trainer.reference, lms[0]):
                head = ReferenceHead(trainer.reference, trainer.model, heads[1].projection)
                heads[1] = replace(heads[1], projection=head)
            yield heads


def images_are_read(trainer: "RolloutTrainer", sequences: tuple[Tensor, ...]) -> bool:
    """
    Check that policy and prior read the images of a rollout that was scored: see [`check_reads_images`].

    Args:
        trainer (`RolloutTrainer`):
            Holds the policy, the prior, and the inputs and scores of the rollout.
        sequences (`tuple[Tensor, ...]`):
            prompt_ids, prompt_mask (B, P), completion_ids, completion_mask (B, T) of the rollout.

    Returns:
        Whether there was something to check: a rollout without images tells nothing, nor do weights that are sharded,
        which cannot be run on single rows.
    """
    rows, scored = trainer.model_inputs, trainer._in_flight.scored
    if trainer.sharded or not any("pixel_values" in row for row in rows or []):
        return False
    policy = trainer._plain_policy
    with trainer.accelerator.autocast():
        check_reads_images(policy, sequences, scored["token_log_probs"], rows, trainer.temperature)
        with trainer.reference.active(policy) as module:
            prior = plain(module, trainer.accelerator)
            check_reads_images(prior, sequences, scored["ref_token_log_probs"], rows, trainer.temperature)
    return True
