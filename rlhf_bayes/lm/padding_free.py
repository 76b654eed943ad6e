"""Lets a causal LM score without padding, several sequences in a row, after a check that this changes nothing."""

import torch
from torch import nn

from rlhf_bayes.lm.adapters import base_causal_lm, described
from rlhf_bayes.lm.forward import agree, runs_plainly, scores_of
from rlhf_bayes.lm.pretrained import has_whole_weights
from rlhf_bayes.lm.probe import disagreement, evaluating


def enable_packing(model: nn.Module) -> None:
    """
    Let [`score_completions`] run the sequences of a batch without padding, several in a row.

    They are told apart by position ids that start again at 0, without an attention mask, as transformers takes them.
    With flash attention all are in one row; otherwise a row is as long as the longest of them, so that attention
    needs no more memory than in a padded batch.

    Args:
        model (`nn.Module`):
            Prepared by [`enable_completion_scoring`], not yet wrapped by an engine.

    Raises:
        ValueError: if the model is run in plain passes, if its log-probabilities change beside other sequences in a
            row, or if ZeRO-3 shards its weights, so that this cannot be found out.
    """
    if runs_plainly(model):
        raise _refused(model, "padding or a cache changes what it computes, so it is run in plain passes")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise _refused(model, "ZeRO-3 shards its weights, so that whether packing changes its scores is not known")
    # weights that are not yet materialised cannot be run; the process that holds them checks
    if has_whole_weights(model):
        _check(model)
    base_causal_lm(model)._packs_rows = True


@torch.no_grad()
def _check(model: nn.Module) -> None:
    """Compare scores of a short sequence alone with those behind two longer ones, one of them in the same row."""
    lm = base_causal_lm(model)
    ids = torch.arange(16, device=lm.device).remainder(lm.config.get_text_config().vocab_size)[None]  # (1, 16)
    short, longer, longest = (ids[:, :6], 2), (ids[:, 2:9].flip(1), 3), (ids, 5)
    with evaluating(model):
        alone = scores_of(model, short)
        lm._packs_rows = True
        try:
            beside = scores_of(model, short, longer, longest)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _refused(model, f"it stops: {type(error).__name__}: {error}") from error
        finally:
            lm._packs_rows = False
    if not agree(model, alone, beside):
        difference = f"{disagreement(alone, beside):.3g} nats a token"
        raise _refused(model, f"the log-probs of a completion change by {difference} beside others in a row")


def _refused(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"`padding_free` must be False for {described(model)}, got True: {reason}. Leave it out.")
