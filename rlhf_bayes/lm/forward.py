"""A causal LM's forward that scores completions, in one pass and on completion tokens only.

It works behind DDP, DeepSpeed and FSDP too.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_bayes.lm.adapters import base_causal_lm, described, is_prompt_learning
from rlhf_bayes.lm.critic import CRITIC, Critic, states_at
from rlhf_bayes.lm.generation import equal_length_groups, generates_what_it_scores
from rlhf_bayes.lm.head import LMHead, token_log_probs_and_entropy
from rlhf_bayes.lm.model_inputs import RowInputs, collated
from rlhf_bayes.lm.packing import packed
from rlhf_bayes.lm.pretrained import check_decoder_only, has_whole_weights
from rlhf_bayes.lm.probe import disagreement, evaluating, plain_logits, rounding
from rlhf_bayes.lm.trunk import trunk_of

_AGREEMENT = 1e-4  # relative difference allowed between log-probs of the same tokens in two batches, in fp32


class CompletionScores(NamedTuple):
    """The results of one forward for completion tokens: (B, T), fp32, 0 on padding; None where not asked for."""

    log_probs: Tensor | None
    """log π(token | prefix), nats."""
    entropy: Tensor | None
    """Entropy of π(· | prefix), nats."""
    values: Tensor | None
    """The critic's value of each prefix, before its next token, in units of the reward."""
    hidden: Tensor | None
    """(N, H): last hidden states before each of the N valid tokens, in row order."""

    def within(self, mask: Tensor | None) -> "CompletionScores":
        """The same with log-probs and entropies of 0 where a mask (B, T) is 0; unchanged without one."""
        if mask is None:
            return self
        columns = (x if x is None else torch.where(mask.bool(), x, 0.0) for x in (self.log_probs, self.entropy))
        return CompletionScores(*columns, self.values, self.hidden)


def enable_completion_scoring(model: nn.Module) -> None:
    """
    Teach a causal LM's forward to score completions.

    Then `model(..., completion_ids=, completion_mask=)` returns [`CompletionScores`] instead of logits, and
    `model(..., trunk_only=True)` returns what the model under the head does. `model(scores=)` returns these scores, so
    that an engine around the model treats them as its own. Other calls, `generate` among them, are untouched.

    The forward is patched rather than wrapped so that DDP, DeepSpeed and FSDP see one module with one forward, and
    PEFT and `save_pretrained` an ordinary transformers model. Calling it twice is harmless.

    A model whose log-probabilities change with left padding or with the cache of `generate` (recurrent models, those
    that ignore the mask or the positions, prompts of virtual tokens) is run in plain passes: see [`runs_plainly`].

    Raises:
        ValueError: if the model is no causal LM, if log-probabilities computed from hidden states differ from those
            of the model's own logits, or if they depend on other rows or on later tokens.
    """
    lm = base_causal_lm(model)
    if not getattr(lm, "_scores_completions", False):
        _check_is_causal_lm(lm)
        _patch_forward(lm)
    if "_checked_scores" not in vars(model):
        if is_prompt_learning(model):
            lm._runs_plainly = True
        # weights that are sharded or not yet materialised cannot be run here
        if has_whole_weights(model):
            _check_scores(model)
        model._checked_scores = True  # of the wrapper too, whose adapters may do what the base does not


def runs_plainly(model: nn.Module) -> bool:
    """
    Whether the model computes its distribution in plain passes only: prompts of equal length, without a cache.

    Args:
        model (`nn.Module`):
            Prepared by [`enable_completion_scoring`]; an engine may have wrapped it since.
    """
    return getattr(_lm_in(model), "_runs_plainly", False)


def packs_rows(model: nn.Module) -> bool:
    """Whether [`score_completions`] packs rows, as [`~rlhf_bayes.lm.padding_free.enable_packing`] lets it."""
    return getattr(_lm_in(model), "_packs_rows", False)


def _attends_in_flash(model: nn.Module) -> bool:
    return "flash" in (_lm_in(model).config.get_text_config()._attn_implementation or "")


def _counts_positions_itself(model: nn.Module) -> bool:
    """Whether positions depend on the images (Qwen-VL, GLM-V): such a model must find them by itself."""
    return hasattr(trunk_of(_lm_in(model)), "get_rope_index")


def _lm_in(model: nn.Module) -> Any:
    """The causal LM inside of adapters and of the engine, if any, that wraps it."""
    return base_causal_lm(getattr(model, "module", model))


def _check_is_causal_lm(lm: nn.Module) -> None:
    check_decoder_only(lm.config, type(lm).__name__)
    if not hasattr(lm, "get_output_embeddings") or lm.get_output_embeddings() is None:
        raise ValueError(
            f"A causal LM is needed, got {type(lm).__name__}, which has no head over the vocabulary. Load the model "
            "with `AutoModelForCausalLM`."
        )


def _patch_forward(lm: PreTrainedModel) -> None:
    # an earlier patch (accelerate's hooks, TRL's fused head) is kept; otherwise the class's own forward is called,
    # which is right in a deep copy too
    earlier_patch = vars(lm).get("forward")

    # Keep the original signature: `generate` validates its keyword arguments against it
    @functools.wraps(type(lm).forward)
    def forward(
        self,
        *args,
        completion_ids=None,
        completion_mask=None,
        num_tokens=None,
        before=None,
        temperature=1.0,
        hidden_only=False,
        with_hidden=False,
        with_values=True,
        trunk_only=False,
        scores=None,
        **kwargs,
    ):
        if scores is not None:
            return scores
        if trunk_only:
            # autocast is off, so that the trunk runs in the precision of its weights, like a separate model
            with torch.autocast(self.device.type, enabled=False):
                return trunk_of(self)(*args, **kwargs)
        if completion_ids is None:
            return (
                type(self).forward(self, *args, **kwargs) if earlier_patch is None else earlier_patch(*args, **kwargs)
            )
        outputs = trunk_of(self)(**kwargs, use_cache=False)
        if before is None:
            before = _tokens_before(outputs.last_hidden_state, completion_ids.size(1))
        places = token_places(completion_mask, num_tokens)
        before = before.flatten().index_select(0, places)  # (N,)
        hidden = states_at(outputs, before)  # (N, H)
        critic: Critic | None = getattr(self, CRITIC, None) if with_values else None
        values = None if critic is None else scatter(critic(self, hidden, before, kwargs), completion_mask)
        if hidden_only:
            return CompletionScores(None, None, values, hidden)
        head = LMHead.of(self, temperature)
        targets = completion_ids.flatten().index_select(0, places)  # (N,)
        log_probs, entropy = token_log_probs_and_entropy(hidden, targets, head)
        columns = (scatter(column, completion_mask) for column in (log_probs, entropy))
        return CompletionScores(*columns, values, hidden if with_hidden else None)

    lm.forward = types.MethodType(forward, lm)
    lm._scores_completions = True


def _tokens_before(states: Tensor, num_columns: int) -> Tensor:
    """Where the token before each of the last T columns stands among those of padded rows: (B, L, H) -> (B, T)."""
    # counted from the end, since a PEFT wrapper may have put virtual tokens at the start
    every = torch.arange(states.size(0) * states.size(1), device=states.device).view(states.shape[:2])  # (B, L)
    return every[:, -num_columns - 1 : -1]


def score_completions(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float = 1.0,
    hidden_only: bool = False,
    with_hidden: bool = False,
    with_values: bool = True,
    model_inputs: Sequence[RowInputs] | None = None,
) -> CompletionScores:
    """
    Score completions by one teacher-forced pass of a model prepared by [`enable_completion_scoring`].

    Positions count only attended tokens, so left padding changes nothing, not even with learnt position embeddings. A
    model for which this is not true ([`runs_plainly`]) is run once for each length of prompts, without left padding.
    Columns that are padding in every row are cut off.

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
        with_hidden (`bool`):
            Return hidden states besides.
        with_values (`bool`):
            Run the critic too, where the model has one.
        model_inputs (`Sequence[RowInputs]`, *optional*):
            Inputs of each of the B prompts besides its tokens: those of its images.

    Raises:
        ValueError: if there are `model_inputs` for a model that is run in plain passes, or without padding.
    """
    sequences = prompt_ids, prompt_mask, completion_ids, completion_mask
    options = {"temperature": temperature, "with_values": with_values}
    options |= {"hidden_only": hidden_only, "with_hidden": with_hidden}
    if model_inputs is not None and (runs_plainly(model) or packs_rows(model)):
        raise ValueError(
            f"`model_inputs` must be None for {described(model)}, which is run in passes without padding, got those "
            f"of {len(model_inputs)} rows. Take a model that knows masks and positions, and leave `padding_free` out."
        )
    if not runs_plainly(model):
        return _score_batch(model, *sequences, model_inputs=model_inputs, **options)
    groups = equal_length_groups(prompt_mask.sum(1).tolist())
    parts = [_score_batch(model, *(x[rows] for x in sequences), unpadded=True, **options) for rows in groups]
    order = torch.tensor([row for rows in groups for row in rows], device=prompt_ids.device).argsort()
    columns = (None if x[0] is None else torch.cat(x)[order] for x in zip(*(part[:-1] for part in parts), strict=True))
    if not (hidden_only or with_hidden):
        return CompletionScores(*columns, None)
    by_row = [
        states
        for rows, part in zip(groups, parts, strict=True)
        for states in part.hidden.split(completion_mask[rows].sum(1).tolist())
    ]
    return CompletionScores(*columns, torch.cat([by_row[position] for position in order.tolist()]))


def _score_batch(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    unpadded: bool = False,
    model_inputs: Sequence[RowInputs] | None = None,
    **options: Any,
) -> CompletionScores:
    packs, width = packs_rows(model), completion_mask.size(1)
    sizes = (
        prompt_mask.any(dim=0).long().argmax(),
        completion_mask.any(dim=0).cumsum(0).argmax() + 1,
        completion_mask.bool().sum(),
    )
    numbers = torch.stack(sizes)
    if packs:
        numbers = torch.cat([numbers, prompt_mask.long().sum(1) + completion_mask.long().sum(1)])
    start, stop, num_tokens, *lengths = numbers.tolist()  # at once, since the host waits for the device here
    prompt_ids, prompt_mask = prompt_ids[:, start:], prompt_mask[:, start:]
    completion_ids, completion_mask = completion_ids[:, :stop], completion_mask[:, :stop]
    ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, P + T), without the columns that were cut off
    mask = torch.cat([prompt_mask.long(), completion_mask.long()], dim=1)  # (B, P + T)
    inputs: dict[str, Tensor] = {}
    if model_inputs:
        prompt_lengths, widths = prompt_mask.sum(1).tolist(), (prompt_ids.size(1), completion_ids.size(1))
        inputs = collated(model_inputs, prompt_lengths, *widths, prompt_ids.device)
    if packs:
        rows = packed(ids, mask, lengths, one_row=_attends_in_flash(model))
        inputs |= {"input_ids": rows.input_ids, "position_ids": rows.position_ids}
        inputs["before"] = rows.slots[:, -completion_ids.size(1) :] - 1  # (B, T)
    else:
        # without left padding, positions are those that any model counts by itself; some take no others
        if not unpadded and not (inputs and _counts_positions_itself(model)):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs |= {"input_ids": ids, "attention_mask": mask}
    scores = model(
        **inputs,
        completion_ids=completion_ids,
        completion_mask=completion_mask.bool(),
        num_tokens=num_tokens,
        **options,
    )
    if not isinstance(scores, CompletionScores):
        raise ValueError(
            f"`model` must run the forward of the causal LM inside it, but {described(model)} runs another one, which "
            "cannot score completions. Take another kind of adapter, LoRA for instance."
        )
    columns = (x if x is None else nn.functional.pad(x, (0, width - stop)) for x in scores[:-1])
    return CompletionScores(*columns, scores.hidden)


def token_places(mask: Tensor, num_tokens: int | None = None) -> Tensor:
    """The places of the N valid tokens of a bool mask (B, T) in its B·T entries, in row order: (N,)."""
    if num_tokens is None:
        return mask.flatten().nonzero().squeeze(-1)
    # not `nonzero`, whose count the host would wait for, and again in a backward pass through a mask
    return mask.flatten().logical_not().byte().argsort(stable=True)[:num_tokens]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the valid positions in their places: (N, …) -> (B, T, …), 0 elsewhere. It keeps the gradient."""
    inner = values.shape[1:]
    return values.new_zeros(*mask.shape, *inner).masked_scatter(mask.view(*mask.shape, *(1 for _ in inner)), values)


@torch.no_grad()
def _check_scores(model: nn.Module) -> None:
    """Compare scores of a short row with the model's own logits: alone, and beside a longer prompt and completion."""
    lm = base_causal_lm(model)
    size = lm.config.get_text_config().vocab_size
    ids = torch.arange(10, device=lm.device).remainder(size)  # (10,)
    row, longer_prompt, longer_completion = ids[None, :6], ids[None, 2:9], ids[None, :8].clone()
    longer_completion[:, 2:] = ids[2:8].flip(0)
    with evaluating(model):
        try:
            expected, prefixes = _plain_log_probs(model, row)  # (1, 4)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"`model` must give logits for `input_ids` and `attention_mask` alone, and {described(model)} "
                f"stops: {type(error).__name__}: {error}. Kinds of adapter that need more (`task_ids`) cannot be a "
                "distribution over completions of a prompt: take another kind."
            ) from error
        alone = scores_of(model, (row, 2))
        _check_against_logits(lm, alone, expected)
        if not agree(model, expected, prefixes):
            raise ValueError(
                f"`model` ({described(model)}) must be a causal LM, but its log-prob of a token changes with the "
                f"tokens after it, by {disagreement(expected, prefixes):.3g} nats: no text could be drawn from it "
                "token by token. Pass a causal LM, with `is_decoder=True` where its config has that, "
                "and an adapter that does not look at whole sequences."
            )
        beside = scores_of(model, (row, 2), (longer_completion, 2))
        if not agree(model, alone, beside):
            raise ValueError(
                f"`model` ({described(model)}) must score a completion by itself, but its log-probs change by "
                f"{disagreement(alone, beside):.3g} nats in a batch with another completion of the same prompt, so "
                "there is no one distribution to train or to draw from. Pass a model without this dependence."
            )
        if not runs_plainly(model):
            padded = scores_of(model, (row, 2), (longer_prompt, 5))
            lm._runs_plainly = not agree(model, alone, padded) or not _generates_alike(model, row, longer_prompt)


def _plain_log_probs(model: nn.Module, row: Tensor) -> tuple[Tensor, Tensor]:
    # of the tokens after the second, from the whole row and from the prefix of each
    whole = plain_logits(model, row)[:, 1:-1]  # (1, 4, V)
    parts = [plain_logits(model, row[:, :length])[:, -1:] for length in range(2, row.size(1))]
    pair = (logits.float().log_softmax(-1) for logits in (whole, torch.cat(parts, dim=1)))
    first, second = (log_probs.gather(-1, row[:, 2:, None]).squeeze(-1) for log_probs in pair)
    return first, second


def scores_of(model: nn.Module, *rows: tuple[Tensor, int]) -> Tensor:
    """Scores (1, T) of the first of some rows in one batch, each (1, L) with the length of its prompt."""
    pads = nn.functional.pad
    left, right = (max(x) for x in zip(*((cut, row.size(1) - cut) for row, cut in rows), strict=True))
    prompts, masks, completions, tails = [], [], [], []
    for row, cut in rows:
        ones, missing = torch.ones_like(row), ((left - cut, 0), (0, right - row.size(1) + cut))
        prompts.append(pads(row[:, :cut], missing[0]))
        masks.append(pads(ones[:, :cut], missing[0]))
        completions.append(pads(row[:, cut:], missing[1]))
        tails.append(pads(ones[:, cut:], missing[1]))
    batch = (torch.cat(part) for part in (prompts, masks, completions, tails))
    first, cut = rows[0]
    scores = score_completions(model, *batch, with_values=False)
    return scores.log_probs[:1, : first.size(1) - cut]


def _generates_alike(model: nn.Module, *rows: Tensor) -> bool:
    tolerance = max(_AGREEMENT, rounding(model))
    return generates_what_it_scores(
        model, [row[0, :length] for row, length in zip(rows, (2, 5), strict=True)], 3, tolerance
    )


def agree(model: nn.Module, first: Tensor, second: Tensor) -> bool:
    """Whether log-probs of the same tokens in two batches are the same but for rounding."""
    # the mean, since single tokens of a model in half precision may differ by more than a tenth of a nat
    if base_causal_lm(model).dtype != torch.float32:
        return disagreement(first, second) <= rounding(model)
    return disagreement(first, second) <= _AGREEMENT * max(1.0, first.abs().mean().item())


def _check_against_logits(lm: PreTrainedModel, scores: Tensor, expected: Tensor) -> None:
    # a model that scales, caps or shifts its logits in a way that LMHead does not know would silently be trained
    # towards a wrong distribution
    error = (scores - expected).abs().max().item()
    if not error <= rounding(lm):
        raise ValueError(
            f"`model` ({type(lm).__name__}) must compute its logits as softcap(scale · head(hidden)): its log-probs "
            f"differ by {error:.3g} nats from those computed from its last hidden states, so every KL would be wrong. "
            "This model family is not supported yet; please report it with its config."
        )
