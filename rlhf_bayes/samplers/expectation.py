"""Means under the posterior from what a sampler returned, with the standard error that is right for it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_bayes.numerics import effective_sample_size
from rlhf_bayes.samplers.draws import Draws


class Expectation(NamedTuple):
    """Of each prompt: (P,), fp64; nan for a prompt without weighted rows."""

    mean: Tensor
    """Estimate of E_π*[f]."""
    standard_error: Tensor
    """Its standard error; infinite where one row counts alone."""


def expectation(draws: Draws, values: Sequence[float] | Tensor) -> Expectation:
    r"""
    E_π*[f] of each prompt, with its standard error:

        weighted, or independent rows:    √Σ_i w̄_i²·(f_i − f̄)²
        resampled from N weighted ones:   √(1/n Σ_i w̄_i·(f_i − f̄)² + s²/n),    w̄_i among the N
        particles of SMC:                 √((n/(n−1))^{m+1}·Σ_a (Σ_{i from a} w̄_i·(f_i − f̄)/(1 − W_a))²),
                                          m resamplings, a the particle of the start that i comes from, W_a the
                                          weight of all that come from a;
                                          not below σ/√(effective particles)
        chains of Metropolis–Hastings:    s/√ESS,    ESS by the autocorrelation of f

    with w̄ normalised weights, s the standard deviation of f and σ the weighted one. 1 − W_a makes SMC's that of a
    jackknife over ancestors: without it, and without the floor, intervals are too short where few ancestors are left.

    Args:
        draws ([`Draws`]):
            Of a sampler whose guarantee is not `"none"`; if `"bounded"`, the mean is that of the draws' distribution.
        values (`Sequence[float]` or `torch.Tensor`):
            f of each row: (B,), finite where the row's weight is not 0.

    Raises:
        `ValueError`: values of another length or not finite, draws that do not target the posterior, or chains of
            different lengths.

    Source: the first, Owen 2013, equation 9.9; SMC's, Lee & Whiteley 2018, arXiv 1509.00394; the last,
    [`~rlhf_bayes.numerics.effective_sample_size`].
    """
    f = torch.as_tensor(values).detach().double().cpu()
    if f.shape != (len(draws),):
        raise ValueError(f"`values` must have one number a row, {len(draws)}, got shape {tuple(f.shape)}.")
    if draws.guarantee == "none":
        raise ValueError(
            "`draws` must target the posterior, got the guarantee 'none': their mean is no estimate of the "
            "posterior's. Take the mean of their values itself, or draw with another sampler."
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
    mean = (weights * f).sum()
    deviations = f - mean
    n = int((weights > 0).sum())
    if "chains" in draws.info:
        chains = int(draws.info["chains"])
        if len(f) % chains:
            raise ValueError(
                f"Chains must have the same length for a standard error, got {len(f)} rows of {chains} chains. Ask "
                "for a multiple of `num_chains`."
            )
        error = _chain_error(f.view(-1, chains).T)  # rows are steps of all chains, one after the other
    elif "candidate_weights" in draws.info:
        shares = torch.tensor(draws.info["candidate_weights"], dtype=torch.float64)[draws.prompt_index == prompt]
        # a row stands for the candidates: drawn by w̄, it has one factor w̄ of Σ w̄²·(f − f̄)² already
        error = ((shares + 1 / n) * deviations.square()).mean().sqrt()
    elif "ancestor" in draws.info:
        ancestor = torch.tensor(draws.info["ancestor"])[draws.prompt_index == prompt]
        error = _particle_error(
            weights, deviations, ancestor, draws.info["resamplings"][prompt], draws.info["effective_particles"][prompt]
        )
    else:
        error = (weights.square() * deviations.square()).sum().sqrt()
    return float(mean), float(error) if n > 1 else torch.inf


def _chain_error(chains: Tensor) -> Tensor:  # (C, S)
    if bool((chains == chains[0, 0]).all()):
        return chains.new_zeros(())
    return chains.std() / effective_sample_size(chains).sqrt()


def _particle_error(  # (n,), (n,), (n,)
    weights: Tensor, deviations: Tensor, ancestor: Tensor, resamplings: int, effective_particles: float
) -> Tensor:
    n, zeros = len(weights), torch.zeros_like(weights)
    if bool((deviations[weights > 0] == 0).all()):
        return zeros.new_zeros(())
    sums = zeros.index_add(0, ancestor, weights * deviations)  # those that share an ancestor vary together
    others = 1 - zeros.index_add(0, ancestor, weights)
    if bool((others < 1e-9).any()):
        return zeros.new_tensor(torch.inf)  # one ancestor is left: nothing tells how another would have done
    growth = (n / max(n - 1, 1)) ** (resamplings + 1)
    floor = (weights * deviations.square()).sum() / effective_particles
    return torch.maximum(growth * (sums / others).square().sum(), floor).sqrt()
