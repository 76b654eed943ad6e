"""Log-probs in bf16 against fp32 and fp64, with a head in bf16 and in fp32."""

import copy
from dataclasses import replace

import pytest
import torch

from rlhf_bayes.lm import score_completions
from rlhf_bayes.lm.head import LMHead, token_log_probs_and_entropy
from rlhf_bayes.lm.probe import disagreement, rounding

from .models import models, sequences

EPS = torch.finfo(torch.bfloat16).eps  # twice the largest relative error of rounding


@pytest.fixture
def batch(size, device):
    return sequences(size, device)


@torch.no_grad()
def test_log_probs_in_bf16_are_those_of_fp32_but_for_rounding(size, device, batch):
    exact, coarse = models(size, device, {"dtype": torch.float32}, {"dtype": torch.bfloat16})
    mask = batch[-1]
    expected, found = (score_completions(model, *batch).log_probs[mask] for model in (exact, coarse))
    assert found.dtype == torch.float32
    assert 0 < disagreement(found, expected) < rounding(coarse)
    # the largest of many is some standard deviations; a row that reads padding or wrong positions is nats away
    assert (found - expected).abs().max() < 10 * rounding(coarse)
    assert disagreement(found.roll(1), expected) > 10 * rounding(coarse)  # so the test can fail


@torch.no_grad()
def test_a_head_in_fp32_keeps_what_a_head_in_bf16_rounds_away(size, device, batch):
    """On the same hidden states, against fp64: one rounding of each logit, and none."""
    (model,) = models(size, device, {"dtype": torch.bfloat16})
    hidden = score_completions(model, *batch, hidden_only=True).hidden  # (N, H) bf16
    targets = batch[2][batch[3]]  # (N,)
    logits = hidden.double() @ model.lm_head.weight.double().T  # (N, V)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    head = LMHead.of(model)
    exact_head = replace(head, projection=copy.deepcopy(model.lm_head).float())
    in_bf16, _ = token_log_probs_and_entropy(hidden, targets, head)
    in_fp32, _ = token_log_probs_and_entropy(hidden.float(), targets, exact_head)
    # half of it by the target's logit and half by the normaliser; twice, since a GPU may add parts of a sum in bf16
    bound = 2 * EPS * logits.abs().amax(-1)  # (N,)
    errors = (in_bf16 - expected).abs()
    assert (errors < bound + 1e-4).all()
    assert (in_fp32 - expected).abs().max() < errors.mean() / 10
