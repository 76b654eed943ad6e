"""Sums and moments over the valid tokens. Padding never matters: it may hold nan or infinities."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """
    Sum of the entries where `mask` holds: `Σ_i m_i x_i`.

    Args:
        x (`torch.Tensor`): any shape.
        mask (`torch.Tensor`): bool, same shape as `x`.
        dim (`int`, `tuple[int, ...]`, *optional*): dimensions to reduce; all of them by default.

    Returns:
        `torch.Tensor`: `x` reduced over `dim`, in fp32 or better; 0 where nothing is valid.

    Raises:
        ValueError: if `mask` is not bool, or has another shape.
    """
    return zero_padding(x, mask).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """
    Mean of the entries where `mask` holds: `Σ_i m_i x_i / Σ_i m_i`.

    Args:
        x (`torch.Tensor`): any shape.
        mask (`torch.Tensor`): bool, same shape as `x`.
        dim (`int`, `tuple[int, ...]`, *optional*): dimensions to reduce; all of them by default.

    Returns:
        `torch.Tensor`: `x` reduced over `dim`, in fp32 or better; nan where nothing is valid, as `torch.mean`.

    Raises:
        ValueError: if `mask` is not bool, or has another shape.
    """
    return masked_sum(x, mask, dim=dim) / mask.sum(dim=dim)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """
    Variance of the entries where `mask` holds: `Σ_i m_i (x_i − x̄)² / (n − 1)`, or over `n` if not unbiased.

    Args:
        x (`torch.Tensor`): any shape.
        mask (`torch.Tensor`): bool, same shape as `x`.
        unbiased (`bool`, defaults to `True`): whether to divide by `n − 1`.

    Returns:
        `torch.Tensor`: scalar; nan when too few entries are valid, as `torch.var`.

    Raises:
        ValueError: if `mask` is not bool, or has another shape.
    """
    centred = zero_padding(x, mask) - masked_mean(x, mask)
    return masked_sum(centred.square(), mask) / (mask.sum() - int(unbiased))


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """
    Scale the valid entries to unit variance: `(x − x̄) / √(var + 1e-8)`, plus `x̄` if the mean is not shifted.

    The variance is the unbiased one, as in lm-human-preferences, which shifts the mean for advantages but not for
    rewards.

    Args:
        x (`torch.Tensor`): any shape.
        mask (`torch.Tensor`): bool, same shape as `x`.
        shift_mean (`bool`, defaults to `True`): whether the result has mean 0; otherwise it keeps the mean of `x`.

    Returns:
        `torch.Tensor`: same shape as `x`, 0 on padding.

    Raises:
        ValueError: if `mask` is not bool, has another shape, or leaves fewer than two entries.
    """
    _check_mask(x, mask)
    n_valid = int(mask.sum())
    if n_valid < 2:
        raise ValueError(
            f"`mask` must leave at least two entries to whiten, got {n_valid}: one value has no variance. Enlarge the "
            "batch, or do not whiten."
        )
    mean = masked_mean(x, mask)
    whitened = (zero_padding(x, mask) - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def _check_mask(x: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be bool, got {mask.dtype}: pass `mask.bool()`.")
    if mask.shape != x.shape:
        raise ValueError(
            f"`mask` must have the shape of what it masks, got {tuple(mask.shape)} for {tuple(x.shape)}: expand it."
        )


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """The tensor in fp32 or better, with 0 on padding; the gradient on padding is 0 too."""
    _check_mask(x, mask)
    # in half precision a sum of ones stops growing at 2048 (fp16) or 256 (bf16)
    x = x if x.dtype == torch.float64 else x.float()
    # torch.where rather than a product with the mask: padding may hold −inf, and −inf · 0 is nan
    return torch.where(mask, x, 0.0)
