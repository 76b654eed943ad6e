import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics.masked import masked_mean, masked_sum, masked_var, masked_whiten

MASK = torch.tensor([[True, True, False, False], [True, True, True, False]])
POISON = torch.tensor([[3.0, -1.0, torch.nan, torch.inf], [0.5, 2.5, 4.0, -torch.inf]])
VALID = torch.tensor([3.0, -1.0, 0.5, 2.5, 4.0])


def test_moments_see_only_the_valid_entries():
    assert_close(masked_sum(POISON, MASK), VALID.sum())
    assert_close(masked_mean(POISON, MASK), VALID.mean())
    assert_close(masked_var(POISON, MASK), VALID.var())
    assert_close(masked_var(POISON, MASK, unbiased=False), VALID.var(unbiased=False))


def test_reduction_over_a_dimension():
    assert_close(masked_sum(POISON, MASK, dim=-1), torch.tensor([2.0, 7.0]))
    assert_close(masked_mean(POISON, MASK, dim=1), torch.tensor([1.0, 7 / 3]))
    assert_close(masked_sum(POISON, MASK, dim=(0, 1)), VALID.sum())


def test_a_legal_minus_infinity_is_kept():
    x = torch.tensor([0.0, -torch.inf, 1.0])
    assert masked_sum(x, torch.tensor([True, True, False])) == -torch.inf
    assert masked_sum(x, torch.tensor([True, False, True])) == 1.0


def test_nothing_valid():
    mask = torch.zeros_like(MASK)
    assert masked_sum(POISON, mask) == 0
    assert masked_mean(POISON, mask).isnan()


def test_padding_leaves_no_nan_in_the_gradient():
    x = POISON.clone().requires_grad_()
    masked_whiten(x, MASK)[0, 0].backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~MASK] == 0).all()


def test_half_precision_is_summed_in_fp32():
    x = torch.ones(1000, dtype=torch.bfloat16)
    total = masked_sum(x, torch.ones(1000, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total == 1000
    assert masked_sum(x.double(), torch.ones(1000, dtype=torch.bool)).dtype == torch.float64


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_values_have_unit_variance(shift_mean):
    whitened = masked_whiten(POISON, MASK, shift_mean=shift_mean)
    assert_close(whitened[MASK].std(), torch.tensor(1.0))
    assert_close(whitened[MASK].mean(), torch.tensor(0.0) if shift_mean else VALID.mean())
    assert (whitened[~MASK] == 0).all()
    # an affine map with positive slope: the order and the spacing survive
    expected = (VALID - VALID.mean()) / VALID.std()
    assert_close(whitened[MASK] - whitened[MASK].mean(), expected)


def test_whitening_a_constant_gives_zero():
    assert_close(masked_whiten(torch.full((2, 4), 3.0), MASK), torch.zeros(2, 4))


def test_refusals():
    with pytest.raises(ValueError, match=r"`mask` must be bool, got torch\.int64"):
        masked_sum(POISON, MASK.long())
    with pytest.raises(ValueError, match=r"got \(2, 3\) for \(2, 4\)"):
        masked_mean(POISON, MASK[:, :3])
    with pytest.raises(ValueError, match="at least two entries to whiten, got 1"):
        masked_whiten(POISON, MASK & (POISON == 4.0))
