"""Markov chains that converge to the posterior, by independent proposals or by regrowing suffixes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rlhf_bayes.lm import LanguageModel, Prompt
from rlhf_bayes.lm.continuation import regrow
from rlhf_bayes.lm.language_model import as_completion
from rlhf_bayes.numerics import effective_sample_size, rhat
from rlhf_bayes.numerics.mcmc import rhat_limit
from rlhf_bayes.samplers.dependence import ChainRows
from rlhf_bayes.samplers.draws import Draws, Guarantee
from rlhf_bayes.samplers.protocol import Proposal, SamplerRecord
from rlhf_bayes.samplers.rejection import RejectionSampler
from rlhf_bayes.samplers.scored import (
    Row,
    as_draws,
    check_confidence,
    check_count,
    checked_request,
    draw_scored,
    importance_log_z,
    rows_of,
    weighed,
)

if TYPE_CHECKING:
    from rlhf_bayes.posterior import Posterior


@final
class MetropolisHastings:
    r"""
    Chains of completions. Each step proposes a change of the last completion, or a new draw:

        "suffix":        cut x at i, uniform among its |x| tokens; regrow x' from x_<i by the proposal q; accept with
                         min(1, exp(ℓ' − ℓ) · |x|/|x'| · [π0(x'_≥i)/q(x'_≥i)] / [π0(x_≥i)/q(x_≥i)])
        "independence":  draw x' from q; accept with min(1, w(x')/w(x)),  w = π0·exp(ℓ)/q

    with ℓ = log_likelihood of the completion, and |x| its number of tokens, EOS included. The factor |x|/|x'| is there
    since a longer completion is cut at a given place less often. With the prior as q, the bracket is 1. The second
    kernel needs a proposal close to the posterior; the first keeps the beginning of a good completion.

    **Guarantee: consistent**, or **unconverged** where chains disagree. Means converge as chains grow; the states of a
    chain are not independent. `info` holds the agreement of chains (`rhat`: above 1.01, run longer) and their
    `effective_sample_size`. Chains are unconverged if R̂ of a prompt is above 1.1, and above what independent states of
    so short chains reach by chance: see [`~rlhf_bayes.numerics.mcmc.rhat_limit`].

    Args:
        kernel (`"suffix"` or `"independence"`):
            The kernel, as above.
        proposal ([`Proposal`], *optional*):
            q; for `"suffix"` a [`~rlhf_bayes.LanguageModel`]. Default: the prior.
        num_chains (`int`):
            Chains for each prompt, which run in parallel.
        burn_in (`int`):
            Steps at the start of each chain that are discarded.
        thin (`int`):
            Every `thin`-th state is kept.
        max_start_draws (`int`):
            Most draws for each prompt to find completions that the posterior allows, from which chains start.
        confidence (`float`):
            Confidence of the interval on log Z, which `"independence"` gives.

    Raises:
        `ValueError` or `TypeError`: if an option is out of range.

    Source: Faria et al. 2024, "QUEST", arXiv 2406.00049; independence: Tierney 1994, Annals of Statistics 22(4).
    """

    guarantee: Guarantee = "consistent"

    def __init__(
        self,
        kernel: Literal["suffix", "independence"] = "suffix",
        proposal: Proposal | None = None,
        *,
        num_chains: int = 4,
        burn_in: int = 64,
        thin: int = 1,
        max_start_draws: int = 1000,
        confidence: float = 0.95,
    ):
        if kernel not in ("suffix", "independence"):
            raise ValueError(f'`kernel` must be "suffix" or "independence", got {kernel!r}.')
        if kernel == "suffix" and not (proposal is None or isinstance(proposal, LanguageModel)):
            raise TypeError(
                f'`proposal` must be a LanguageModel for the kernel "suffix", which continues a prefix, got '
                f'{type(proposal).__name__}. Use `kernel="independence"`.'
            )
        check_count("num_chains", num_chains)
        check_count("burn_in", burn_in, at_least=0)
        check_count("thin", thin)
        check_count("max_start_draws", max_start_draws)
        check_confidence(confidence)
        self.kernel = kernel
        self.proposal = proposal
        self.num_chains = num_chains
        self.burn_in = burn_in
        self.thin = thin
        self.max_start_draws = max_start_draws
        self.confidence = confidence

    def sample(
        self,
        posterior: "Posterior",
        prompts: Sequence[Prompt],
        n: int,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Draws:
        """
        n states for each prompt, of equal weight.

        First come the first states of all chains, then the second states, and so on.

        Arguments are those of [`Sampler.sample`]. `info` has, for each prompt: `acceptance`; `rhat` and
        `effective_sample_size`, the worse of those of evidence and of length (None where a chain keeps fewer than 4
        states or neither varies). For `"suffix"` it has `acceptance_by_cut` and `proposals_by_cut`, a number for each
        place, over all prompts. It also has the number of `chains`, and `tokens`, the completion tokens drawn.

        Raises:
            `ValueError`: if too few draws are allowed by the posterior to start all chains, or as in
                [`checked_request`].
        """
        proposal = checked_request(posterior, self.proposal, prompts, n, generator, columns)
        kept = -(-n // self.num_chains)
        run = self._independence if self.kernel == "independence" else self._suffix
        visited, info, log_z = run(posterior, proposal, prompts, kept, generator, columns)
        shape = (len(prompts), self.num_chains)
        evidence = torch.stack([step.view(shape) for step, _ in visited], -1)  # (P, C, S)
        lengths = [torch.tensor([len(row.completion_ids) for row in rows]).view(shape) for _, rows in visited]
        # lengths are compared too, since the evidence of a condition never varies
        summaries = [evidence, torch.stack(lengths, -1).double()]
        info |= _agreement(summaries) | {"chains": self.num_chains}
        guarantee = "unconverged" if _disagree(info["rhat"], evidence, len(summaries)) else self.guarantee
        kept_rows = [
            row
            for first in range(0, len(prompts) * self.num_chains, self.num_chains)
            for row in [row for _, rows in visited for row in rows[first : first + self.num_chains]][:n]
        ]
        chains = ChainRows(self.num_chains)
        return as_draws(kept_rows, len(prompts), guarantee, chains, log_z=log_z, info=info)

    def _keeps(self, step: int) -> bool:
        """Whether the state after a step, counted from 0, is kept."""
        return step >= self.burn_in and (step - self.burn_in + 1) % self.thin == 0

    def _independence(
        self,
        posterior: "Posterior",
        proposal: Proposal,
        prompts: Sequence[Prompt],
        kept: int,
        generator: torch.Generator | None,
        columns: Mapping[str, Sequence] | None,
    ) -> Any:
        shape = (len(prompts), self.num_chains)
        start = self._start(posterior, proposal, prompts, generator, columns)
        evidence, weight = weighed(posterior, proposal, start, start.prompt_index.tolist(), columns)
        rows, evidence, weight = rows_of(start), evidence.view(shape), weight.view(shape)  # (P, C)
        # drawn all at once, since no proposal depends on the state of a chain
        steps = self.burn_in + kept * self.thin
        count = self.num_chains * steps
        scored = draw_scored(posterior, proposal, prompts, [count] * len(prompts), generator, columns)
        weights = scored.log_weights.view(*shape, steps)  # (P, C, N)
        uniform = _uniform(weights.shape, generator).log()
        visited, accepted = [], torch.zeros(shape, dtype=torch.float64)
        for step in range(steps):
            moves = uniform[..., step] < weights[..., step] - weight  # (P, C)
            weight = torch.where(moves, weights[..., step], weight)
            evidence = torch.where(moves, scored.log_likelihood.view(weights.shape)[..., step], evidence)
            pairs = enumerate(zip(rows, moves.flatten().tolist(), strict=True))
            rows = [scored.row(chain * steps + step) if move else row for chain, (row, move) in pairs]
            accepted += moves
            if self._keeps(step):
                visited.append((evidence, rows))
        info = {
            "acceptance": accepted.mean(-1).div(steps).tolist(),
            "tokens": start.info["tokens"] + scored.tokens,
        }
        return visited, info, importance_log_z(list(weights.flatten(1)), self.confidence)

    def _suffix(
        self,
        posterior: "Posterior",
        proposal: Proposal,
        prompts: Sequence[Prompt],
        kept: int,
        generator: torch.Generator | None,
        columns: Mapping[str, Sequence] | None,
    ) -> Any:
        start = self._start(posterior, proposal, prompts, generator, columns)
        chain = _SuffixChains(posterior, cast(LanguageModel, proposal), start, columns)
        steps = self.burn_in + kept * self.thin
        visited = []
        for step in tqdm(range(steps), desc="Metropolis–Hastings", unit="step", delay=5, leave=False):
            chain.move(generator)
            if self._keeps(step):
                visited.append((chain.log_likelihood, chain.rows))
        cuts = chain.proposals_by_cut
        info = {
            "acceptance": chain.accepted.view(len(prompts), -1).mean(-1).div(steps).tolist(),
            "acceptance_by_cut": [
                float(accepted / count) if count else None
                for accepted, count in zip(chain.accepted_by_cut, cuts, strict=True)
            ],
            "proposals_by_cut": cuts.long().tolist(),
            "tokens": start.info["tokens"] + chain.tokens,
        }
        return visited, info, None

    def _start(
        self,
        posterior: "Posterior",
        proposal: Proposal,
        prompts: Sequence[Prompt],
        generator: torch.Generator | None,
        columns: Mapping[str, Sequence] | None,
    ) -> Draws:
        """Draw an allowed completion for each chain to start from."""
        draws = max(self.max_start_draws, self.num_chains)
        sampler = RejectionSampler(proposal, log_bound=-math.inf, quasi=True, max_draws=draws)
        found = sampler.sample(posterior, prompts, self.num_chains, generator, columns)
        few = found.counts < self.num_chains
        if bool(few.any()):
            raise ValueError(
                f"Each of the `num_chains` = {self.num_chains} chains must start from a completion that the posterior "
                f"allows: too few were among {draws} draws, for {int(few.sum())} of {len(prompts)} prompts, the first "
                f"{prompts[int(few.int().argmax())]!r}. Raise `max_start_draws`, or pass a `proposal` trained towards "
                "this posterior."
            )
        return found


class _SuffixChains:
    """B chains of the suffix kernel, which step together."""

    def __init__(
        self, posterior: "Posterior", proposal: LanguageModel, start: Draws, columns: Mapping[str, Sequence] | None
    ):
        self.posterior, self.proposal = posterior, proposal
        self.rows = rows_of(start)
        self.columns = {
            name: [values[row.prompt_index] for row in self.rows] for name, values in (columns or {}).items()
        }
        self.log_likelihood = self._evidence(self.rows)  # (B,)
        self._log_ratios = self._token_log_ratios(self.rows)  # (B, T)
        self.accepted = torch.zeros(len(self.rows), dtype=torch.float64)
        self.proposals_by_cut = torch.zeros(proposal.max_completion_length, dtype=torch.float64)
        self.accepted_by_cut = torch.zeros_like(self.proposals_by_cut)
        self.tokens = 0

    def move(self, generator: torch.Generator | None) -> None:
        """One step of each chain."""
        lengths = torch.tensor([len(row.completion_ids) for row in self.rows])
        cuts = (_uniform(lengths.shape, generator) * lengths).long()  # (B,)
        proposed = self._regrown(cuts.tolist(), generator)
        new_lengths = torch.tensor([len(row.completion_ids) for row in proposed])
        evidence, log_ratios = self._evidence(proposed), self._token_log_ratios(proposed)
        regrown = torch.arange(log_ratios.size(1)) >= cuts[:, None]  # (B, T)
        log_acceptance = (
            evidence
            - self.log_likelihood
            + (lengths / new_lengths).log()
            + torch.where(regrown, log_ratios - self._log_ratios, 0.0).sum(-1)
        )
        moves = _uniform(lengths.shape, generator).log() < log_acceptance  # (B,)
        self.rows = [new if move else old for new, old, move in zip(proposed, self.rows, moves, strict=True)]
        self.log_likelihood = torch.where(moves, evidence, self.log_likelihood)
        self._log_ratios = torch.where(moves[:, None], log_ratios, self._log_ratios)
        self.accepted += moves
        self.proposals_by_cut.index_add_(0, cuts, torch.ones_like(self.accepted))
        self.accepted_by_cut.index_add_(0, cuts, moves.double())
        self.tokens += int((new_lengths - cuts).sum())

    def _regrown(self, cuts: list[int], generator: torch.Generator | None) -> list[Row]:
        prefixes = [row.completion_ids[:cut] for row, cut in zip(self.rows, cuts, strict=True)]
        ids = regrow(self.proposal, [row.prompt for row in self.rows], prefixes, generator)
        tokenizer: Any = self.posterior.prior.tokenizer
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            Row(row.prompt_index, row.prompt, new, text, as_completion(row.prompt, text))
            for row, new, text in zip(self.rows, ids, texts, strict=True)
        ]

    def _evidence(self, rows: Sequence[Row]) -> Tensor:
        prompts, ids, completions = zip(*[(r.prompt, r.completion_ids, r.completion) for r in rows], strict=True)
        return self.posterior.log_likelihood(prompts, completions, ids, self.columns).double().cpu()

    def _token_log_ratios(self, rows: Sequence[Row]) -> Tensor:
        """log π0/q of each token: (B, T), 0 after the last token, and everywhere if q is the prior."""
        ratios = torch.zeros(len(rows), self.proposal.max_completion_length, dtype=torch.float64)
        if self.proposal is self.posterior.prior:
            return ratios
        prompts, ids = [row.prompt for row in rows], [row.completion_ids for row in rows]
        log_prior, mask = self.posterior.prior.token_log_probs(prompts, ids)
        log_q = self.proposal.token_log_probs(prompts, ids)[0]
        ratios[:, : mask.size(1)] = torch.where(mask, log_prior - log_q.to(mask.device), 0.0).double().cpu()
        return ratios


def _uniform(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=device, dtype=torch.float64).cpu()


def _agreement(summaries: Sequence[Tensor]) -> dict[str, list[float | None]]:
    """For each prompt, the worst R-hat and the worst effective sample size over several summaries (P, C, S)."""
    num_prompts, _, steps = summaries[0].shape
    result: dict[str, list[float | None]] = {"rhat": [], "effective_sample_size": []}
    for prompt in range(num_prompts):
        varying = [s[prompt] for s in summaries if steps >= 4 and bool((s[prompt] != s[prompt, 0, 0]).any())]
        sizes = [float(effective_sample_size(chains)) for chains in varying]
        agreements = [float(rhat(chains).nan_to_num(torch.inf)) for chains in varying]
        result["rhat"].append(max(agreements, default=None))
        result["effective_sample_size"].append(min(sizes, default=None))
    return result


def _disagree(rhats: Sequence[float | None], states: Tensor, num_summaries: int) -> bool:
    """Whether chains disagree by more than chance; states are (P, C, S), and R̂ is the largest over the summaries."""
    known = [value for value in rhats if value is not None]
    # R̂ is itself the larger of two: that of the ranks and that of the distances from the median
    looks = 2 * num_summaries * len(rhats)
    return bool(known) and max(known) > rhat_limit(states.size(1), states.size(2), looks)


_MAX_CHAINS, _MIN_STATES = 16, 4


def _from_flags(posterior: "Posterior", proposal: Proposal | None, n: int) -> MetropolisHastings:
    # the standard error needs chains of equal length and several states; many chains cost hardly more than few
    fitting = [chains for chains in range(1, _MAX_CHAINS + 1) if n % chains == 0 and n >= _MIN_STATES * chains]
    if not fitting:
        raise ValueError(f"`--num_samples` must be at least {_MIN_STATES} for metropolis_hastings, got {n}.")
    return MetropolisHastings(proposal=proposal, num_chains=max(fitting), burn_in=32, thin=4)


RECORD = SamplerRecord(
    sampler=MetropolisHastings,
    guarantee="consistent, or unconverged",
    guarantees=("consistent", "unconverged"),
    help="posteriors far from the prior: completions regrown from a cut, R-hat",
    make=_from_flags,
)
