"""A causal LM's forward that scores completions, in one pass and on completion tokens only.

It works behind DDP, DeepSpeed and FSDP too.
"""

import functools
import types
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_bayes.lm.critic import CRITIC, Critic, states_before
from rlhf_bayes.lm.head import LMHead, token_log_probs_and_entropy
from rlhf_bayes.lm.trunk import trunk_of

_AGREEMENT = 1e-3  # nats, of log-probs from hidden states with those from the model's own logits in fp32


class CompletionScores(NamedTuple):
    """What one forward says of the completion tokens: (B, T), fp32, 0 on padding; None where not asked for."""

    log_probs: Tensor | None
    """log π(token | prefix), nats."""
    entropy: Tensor | None
    """Entropy of π(· | prefix), nats."""
    values: Tensor | None
    """The critic's value of each prefix, before its next token, in units of the reward."""
    hidden: Tensor | None
    """(N, H): last hidden states before each of the N valid tokens, in row order."""


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers causal LM inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def enable_completion_scoring(model: nn.Module) -> None:
    """
    Teach a causal LM's forward to score completions.

    Then `model(..., completion_ids=, completion_mask=)` returns [`CompletionScores`] instead of logits, and
    `model(..., trunk_only=True)` returns what the model under the head does. Other calls, `generate` among them, are
    untouched.

    The forward is patched rather than wrapped so that DDP, DeepSpeed and FSDP see one module with one forward, and
    PEFT and `save_pretrained` an ordinary transformers model. Calling it twice is harmless.

    Raises:
        ValueError: if log-probabilities computed from hidden states differ from those of the model's own logits.
    """
    lm = base_causal_lm(model)
    if getattr(lm, "_scores_completions", False):
        return
    # an earlier patch (accelerate's hooks, TRL's fused head) stays; else the class's own, which a deep copy keeps too
    earlier_patch = vars(lm).get("forward")

    # Keep the original signature: `generate` validates its keyword arguments against it
    @functools.wraps(type(lm).forward)
    def forward(
        self,
        *args,
        completion_ids=None,
        completion_mask=None,
        temperature=1.0,
        hidden_only=False,
        with_values=True,
        trunk_only=False,
        **kwargs,
    ):
        if trunk_only:
            # in the precision of the weights, as a model of its own would run
            with torch.autocast(self.device.type, enabled=False):
                return trunk_of(self)(*args, **kwargs)
        if completion_ids is None:
            return (
                type(self).forward(self, *args, **kwargs) if earlier_patch is None else earlier_patch(*args, **kwargs)
            )
        states = states_before(trunk_of(self)(**kwargs, use_cache=False), completion_ids)  # (B, T, H)
        hidden = states[completion_mask]  # (N, H)
        critic: Critic | None = getattr(self, CRITIC, None) if with_values else None
        values = None if critic is None else scatter(critic(self, hidden, completion_mask, kwargs), completion_mask)
        if hidden_only:
            return CompletionScores(None, None, values, hidden)
        head = LMHead.of(self, temperature)
        log_probs, entropy = token_log_probs_and_entropy(hidden, completion_ids[completion_mask], head)
        return CompletionScores(scatter(log_probs, completion_mask), scatter(entropy, completion_mask), values, None)

    lm.forward = types.MethodType(forward, lm)
    lm._scores_completions = True
    # sharded or not yet materialised weights cannot be run here
    if not any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in lm.parameters()):
        _check_against_logits(lm)


def score_completions(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float = 1.0,
    hidden_only: bool = False,
    with_values: bool = True,
) -> CompletionScores:
    """
    Score completions by one teacher-forced pass of a model prepared by [`enable_completion_scoring`].

    Positions count attended tokens, so left padding changes nothing, learnt position embeddings included. Columns that
    are padding in every row do not reach the model.

    Args:
        model (`torch.nn.Module`):
            The prepared model, also inside of an engine.
        prompt_ids, prompt_mask (`Tensor` (B, P)):
            Left-padded prompts.
        completion_ids, completion_mask (`Tensor` (B, T)):
            Right-padded completions; the mask covers the first EOS.
        temperature (`float`):
            Divides the logits.
        hidden_only (`bool`):
            Return hidden states in place of log-probs and entropies, to compare two models token by token.
        with_values (`bool`):
            Run the critic too, where the model has one.
    """
    width = completion_mask.size(1)
    start = int(prompt_mask.any(dim=0).long().argmax())
    stop = int(completion_mask.any(dim=0).cumsum(0).argmax()) + 1
    prompt_ids, prompt_mask = prompt_ids[:, start:], prompt_mask[:, start:]
    completion_ids, completion_mask = completion_ids[:, :stop], completion_mask[:, :stop]
    attention_mask = torch.cat([prompt_mask.long(), completion_mask.long()], dim=1)  # (B, P + T), of those left
    scores = model(
        input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
        completion_ids=completion_ids,
        completion_mask=completion_mask.bool(),
        temperature=temperature,
        hidden_only=hidden_only,
        with_values=with_values,
    )
    columns = (x if x is None else nn.functional.pad(x, (0, width - stop)) for x in scores[:-1])
    return CompletionScores(*columns, scores.hidden)


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values of the valid positions to (B, T), 0 elsewhere; keeps the gradient."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


@torch.no_grad()
def _check_against_logits(lm: PreTrainedModel) -> None:
    # a family that scales, caps or shifts its logits in a way LMHead does not know would be trained towards a wrong
    # distribution in silence
    vocab_size = lm.config.get_text_config().vocab_size
    ids = torch.arange(6, device=lm.device).remainder(vocab_size)[None]  # (1, 6)
    was_training = lm.training
    lm.eval()
    ones = torch.ones_like(ids)
    scores = score_completions(lm, ids[:, :2], ones[:, :2], ids[:, 2:], ones[:, 2:])
    logits = lm(input_ids=ids, attention_mask=ones).logits[:, 1:-1].float()
    lm.train(was_training)
    expected = logits.log_softmax(-1).gather(-1, ids[:, 2:, None]).squeeze(-1)
    error = (scores.log_probs - expected).abs().max().item()
    tolerance = _AGREEMENT if lm.dtype == torch.float32 else 0.1
    if not error <= tolerance:
        raise ValueError(
            f"`model` ({type(lm).__name__}) must compute its logits as softcap(scale · head(hidden)): its log-probs "
            f"differ by {error:.3g} nats from those computed from its last hidden states, so every KL would be wrong. "
            "This model family is not supported yet; please report it with its config."
        )
