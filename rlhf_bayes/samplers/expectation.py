"""Means under the posterior from the draws of a sampler, with the standard error for its kind of draws."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_bayes.samplers.dependence import Dependence
from rlhf_bayes.samplers.draws import Draws


class Expectation(NamedTuple):
    """Means and standard errors of each prompt: (P,), fp64; nan for a prompt without weighted rows."""

    mean: Tensor
    """Estimate of E_π*[f]."""
    standard_error: Tensor
    """Its standard error; infinite where a single row has all the weight."""


def expectation(draws: Draws, values: Sequence[float] | Tensor) -> Expectation:
    """
    E_π*[f] of each prompt, with its standard error.

    The formula of the error is that of `draws.dependence`: see [`IndependentRows`], [`ResampledRows`], [`ChainRows`]
    and [`ParticleRows`].

    Args:
        draws ([`Draws`]):
            Draws whose guarantee is not `"none"`. If it is `"bounded"`, the mean is that of the draws' distribution;
            if it is `"unconverged"`, the standard error is too small.
        values (`Sequence[float]` or `torch.Tensor`):
            f of each row: (B,), finite where the row's weight is not 0.

    Raises:
        `ValueError`: if values have another length or are not finite, draws do not target the posterior, or chains
            have different lengths.
        `TypeError`: if the draws do not say how their rows depend on each other.
    """
    f = torch.as_tensor(values).detach().double().cpu()
    if f.shape != (len(draws),):
        raise ValueError(f"`values` must have one number a row, {len(draws)}, got shape {tuple(f.shape)}.")
    if draws.guarantee == "none":
        raise ValueError(
            "`draws` must target the posterior, got the guarantee 'none': their mean is no estimate of the "
            "posterior's. Take the mean of their values itself, or draw with another sampler."
        )
    if not isinstance(draws.dependence, Dependence):
        raise TypeError(
            "`draws.dependence` must say how the rows depend on each other, IndependentRows(), ResampledRows(…), "
            f"ChainRows(…) or ParticleRows(…), got {type(draws.dependence).__name__}: the standard error rests on it."
        )
    weights = draws.weights
    if not bool(f[weights > 0].isfinite().all()):
        raise ValueError("`values` must be finite where the weight is not 0, got nan or inf.")
    f = torch.where(weights > 0, f, 0.0)
    ends = [
        _of_one_prompt(f[rows], weights[rows], draws, prompt)
        for prompt in range(draws.num_prompts)
        for rows in [draws.prompt_index == prompt]
    ]
    mean, error = torch.tensor(ends, dtype=torch.float64).T
    return Expectation(mean, error)


def _of_one_prompt(f: Tensor, weights: Tensor, draws: Draws, prompt: int) -> tuple[float, float]:
    if weights.sum() == 0:
        return torch.nan, torch.nan
    error = draws.dependence.standard_error(f, weights, draws.prompt_index == prompt, prompt)
    return float((weights * f).sum()), float(error) if int((weights > 0).sum()) > 1 else torch.inf
