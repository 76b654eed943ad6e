"""Log-probs and gradients by the kernels of attention, in padded batches and without padding, against `eager`."""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from rlhf_bayes.lm import score_completions
from rlhf_bayes.lm.padding_free import enable_packing
from rlhf_bayes.lm.probe import rounding

from .models import models, sequences


def log_probs_and_gradient(model, batch):
    """Token log-probs (N,), and the gradient of their sum by the weights of the first layer's keys."""
    model.zero_grad()
    weight = model.model.layers[0].self_attn.k_proj.weight
    log_probs = score_completions(model, *batch).log_probs[batch[-1]]
    (gradient,) = torch.autograd.grad(log_probs.sum(), weight)
    return log_probs.detach(), gradient.float()


def errors(found, expected):
    """Root mean square of the difference of log-probs, nats, and the relative error of the gradient."""
    (log_probs, gradient), (exact, of_exact) = found, expected
    return (log_probs - exact).square().mean().sqrt().item(), ((gradient - of_exact).norm() / of_exact.norm()).item()


@pytest.fixture
def batch(size, device):
    return sequences(size, device)


def test_sdpa_is_eager_attention(size, device, batch):
    variants = ({"dtype": torch.float32, "attn_implementation": kind} for kind in ("eager", "sdpa"))
    eager, sdpa = models(size, device, *variants)
    of_log_probs, of_gradient = errors(log_probs_and_gradient(sdpa, batch), log_probs_and_gradient(eager, batch))
    assert of_log_probs < rounding(sdpa)
    assert of_gradient < 1e-3


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("kind", ["sdpa", "flash_attention_2"])
def test_in_bf16_kernels_are_as_close_to_fp32_as_eager_attention(kind, padding_free, size, device, batch):
    if kind == "flash_attention_2" and not (device.type == "cuda" and is_flash_attn_2_available()):
        pytest.skip("flash attention needs a GPU and `pip install flash-attn --no-build-isolation`")
    exact, eager, kernel = models(
        size,
        device,
        {"dtype": torch.float32, "attn_implementation": "eager"},
        {"dtype": torch.bfloat16, "attn_implementation": "eager"},
        {"dtype": torch.bfloat16, "attn_implementation": kind},
    )
    if padding_free:
        enable_packing(kernel)
    expected = log_probs_and_gradient(exact, batch)
    of_eager = errors(log_probs_and_gradient(eager, batch), expected)
    of_kernel = errors(log_probs_and_gradient(kernel, batch), expected)
    assert 0 < of_kernel[0] < 2 * of_eager[0]
    assert 0 < of_kernel[1] < 2 * of_eager[1]
