"""How the rows of a draw depend on each other, and what that makes of the standard error of a mean."""

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from rlhf_bayes.numerics import effective_sample_size


@runtime_checkable
class Dependence(Protocol):
    """How the rows of [`Draws`] depend on each other. Each way has a class of its own below."""

    def standard_error(self, values: Tensor, weights: Tensor, rows: Tensor, prompt: int) -> Tensor:
        """
        Standard error of the weighted mean of one prompt: (), fp64.

        Args:
            values (`torch.Tensor`): f of the prompt's rows, (n,) fp64; 0 where the weight is 0.
            weights (`torch.Tensor`): w̄, which sum to 1: (n,) fp64.
            rows (`torch.Tensor`): (B,) bool, a mask of these rows among all rows.
            prompt (`int`): index of the prompt.
        """
        ...


@final
@dataclass(frozen=True)
class IndependentRows:
    r"""
    Rows drawn apart from each other, weighted or not.

        √Σ_i w̄_i²·(f_i − f̄)²

    Source: Owen 2013, equation 9.9.
    """

    def standard_error(self, values: Tensor, weights: Tensor, rows: Tensor, prompt: int) -> Tensor:
        """The formula above: (). Arguments are those of [`Dependence.standard_error`]."""
        return (weights.square() * _deviations(values, weights).square()).sum().sqrt()


@final
@dataclass(frozen=True, eq=False)
class ResampledRows:
    r"""
    n rows picked by weight out of N independent candidates.

        √(1/n Σ_i w̄_i·(f_i − f̄)² + s²/n),    w̄_i among the N, s the standard deviation of f
    """

    candidate_weights: Tensor
    """(B,) fp64: w̄ that each row had among its prompt's candidates."""

    def standard_error(self, values: Tensor, weights: Tensor, rows: Tensor, prompt: int) -> Tensor:
        """The formula above: (). Arguments are those of [`Dependence.standard_error`]."""
        n = int((weights > 0).sum())
        # the rows were drawn by w̄, so their mean already has one of the factors w̄ of Σ w̄²·(f − f̄)²
        return ((self.candidate_weights[rows] + 1 / n) * _deviations(values, weights).square()).mean().sqrt()


@final
@dataclass(frozen=True)
class ChainRows:
    r"""
    States of Markov chains: a prompt's rows are the first states of all its chains, then all second ones, and so on.

        s/√ESS,    ESS by the autocorrelation of f, see [`~rlhf_bayes.numerics.effective_sample_size`]
    """

    num_chains: int
    """Number of chains of each prompt."""

    def standard_error(self, values: Tensor, weights: Tensor, rows: Tensor, prompt: int) -> Tensor:
        """
        The formula above: (). Arguments are those of [`Dependence.standard_error`].

        Raises:
            `ValueError`: if chains have different lengths.
        """
        if len(values) % self.num_chains:
            raise ValueError(
                f"Chains must have the same length for a standard error, got {len(values)} rows of {self.num_chains} "
                "chains. Ask for a multiple of `num_chains`."
            )
        chains = values.view(-1, self.num_chains).T  # (C, S)
        if bool((chains == chains[0, 0]).all()):
            return chains.new_zeros(())
        return chains.std() / effective_sample_size(chains).sqrt()


@final
@dataclass(frozen=True, eq=False)
class ParticleRows:
    r"""
    Particles of sequential Monte Carlo, which share ancestors after resampling.

        √((n/(n−1))^{m+1}·Σ_a (Σ_{i from a} w̄_i·(f_i − f̄)/(1 − W_a))²),    not below σ/√(effective particles)

    for m resamplings; a is the initial particle that i descends from, W_a the weight of all descendants of a, σ the
    weighted standard deviation of f. With 1 − W_a it is the standard error of a jackknife over ancestors. Without this
    factor and the lower bound, intervals are too short where few ancestors remain.

    Source: Lee & Whiteley 2018, arXiv 1509.00394.
    """

    ancestor: Tensor
    """(B,) integers below n: the initial particle that each row descends from."""
    resamplings: Tensor
    """(P,) integers: number of resamplings."""
    effective_particles: Tensor
    """(P,): effective number of particles for Z."""

    def standard_error(self, values: Tensor, weights: Tensor, rows: Tensor, prompt: int) -> Tensor:
        """The formula above: (). Arguments are those of [`Dependence.standard_error`]."""
        deviations = _deviations(values, weights)
        n, zeros = len(weights), torch.zeros_like(weights)
        if bool((deviations[weights > 0] == 0).all()):
            return zeros.new_zeros(())
        ancestor = self.ancestor[rows]
        sums = zeros.index_add(0, ancestor, weights * deviations)  # rows that share an ancestor are dependent
        others = 1 - zeros.index_add(0, ancestor, weights)
        if bool((others < 1e-9).any()):
            return zeros.new_tensor(torch.inf)  # with one ancestor the variance cannot be estimated
        growth = (n / max(n - 1, 1)) ** (int(self.resamplings[prompt]) + 1)
        floor = (weights * deviations.square()).sum() / float(self.effective_particles[prompt])
        return torch.maximum(growth * (sums / others).square().sum(), floor).sqrt()


def _deviations(values: Tensor, weights: Tensor) -> Tensor:
    return values - (weights * values).sum()
