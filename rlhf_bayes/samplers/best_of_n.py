"""Best of n, the usual baseline, which does not sample the posterior."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch

from rlhf_bayes.lm import Prompt
from rlhf_bayes.numerics import best_of_n_kl, best_of_n_kl_bound
from rlhf_bayes.samplers.dependence import IndependentRows
from rlhf_bayes.samplers.draws import Draws, Guarantee
from rlhf_bayes.samplers.protocol import Proposal, SamplerRecord
from rlhf_bayes.samplers.scored import as_draws, check_count, check_supported, checked_request, draw_scored

if TYPE_CHECKING:
    from rlhf_bayes.posterior import Posterior


@final
class BestOfN:
    r"""
    The completion with the most evidence among `num_candidates` draws of the prior.

    **Guarantee: none.** It does not target the posterior: N rather than β determines how far it moves, and only the
    rank of the evidence counts. A draw has the distribution

        π_N(x) = π0(x) · (F(v)ᴺ − F⁻(v)ᴺ) / (F(v) − F⁻(v)),    v = log_likelihood(x)

    with F(v) and F⁻(v) the prior's probability of evidence of at most v, and below v. Its KL to the prior is at most
    log N − (N−1)/N, and less where completions tie; `info` has both.

    Args:
        num_candidates (`int`):
            N, the number of completions drawn for each one that is returned.
        proposal ([`Proposal`], *optional*):
            The distribution to draw from. All of the above then holds for it instead of the prior. Default: the prior.

    Raises:
        `ValueError`: if N is below 1.

    Source: Stiennon et al. 2020, arXiv 2009.01325; the KL: Beirami et al. 2024, arXiv 2401.01879.
    """

    guarantee: Guarantee = "none"

    def __init__(self, num_candidates: int = 16, *, proposal: Proposal | None = None):
        check_count("num_candidates", num_candidates)
        self.num_candidates = num_candidates
        self.proposal = proposal

    def sample(
        self,
        posterior: "Posterior",
        prompts: Sequence[Prompt],
        n: int,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Draws:
        """
        n completions of each prompt, each the best of its own `num_candidates`.

        Arguments are those of [`Sampler.sample`]. `info` has `kl_to_prior`, nats, for each prompt, from the ties among
        all n · N candidates; its bound `kl_bound`; and `tokens`, the number of completion tokens drawn.

        Raises:
            `ValueError`: if no draw of any prompt is allowed by the posterior, or as in [`checked_request`].
        """
        proposal = checked_request(posterior, self.proposal, prompts, n, generator, columns)
        size = self.num_candidates
        scored = draw_scored(posterior, proposal, prompts, [n * size] * len(prompts), generator, columns)
        evidence = scored.log_likelihood.view(len(prompts), n, size)
        check_supported((evidence == -torch.inf).flatten(1).all(-1), f"{n * size} completions drawn", prompts)
        # candidates are exchangeable, so the first of equal ones is a random one
        best = evidence.flatten(0, 1).argmax(-1) + size * torch.arange(len(prompts) * n)
        info = {
            "kl_to_prior": [float(best_of_n_kl(row.flatten(), size)) for row in evidence],
            "kl_bound": best_of_n_kl_bound(size),
            "tokens": scored.tokens,
        }
        return as_draws(
            [scored.row(row) for row in best.tolist()], len(prompts), self.guarantee, IndependentRows(), info=info
        )


RECORD = SamplerRecord(
    sampler=BestOfN,
    guarantee="none",
    guarantees=("none",),
    help="what it costs in KL, beside the posterior of the same KL",
    make=lambda posterior, proposal, n: BestOfN(proposal=proposal),
)
