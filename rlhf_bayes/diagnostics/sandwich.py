"""Lower and upper bounds on log Z, where exact draws of the posterior exist."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_bayes.diagnostics.over_prompts import Estimate, over_prompts
from rlhf_bayes.lm import Prompt
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.samplers import Draws, Proposal


@dataclass(frozen=True)
class LogZSandwich:
    """Bounds, means over prompts, in nats: log Z lies between their expectations. With more draws they are closer."""

    lower: Estimate
    upper: Estimate

    def __str__(self) -> str:
        return f"log Z between {self.lower} and {self.upper}"


def log_z_sandwich(log_weights: Tensor, exact_log_weights: Sequence[Tensor]) -> LogZSandwich:
    r"""
    Bounds on log Z that hold in expectation for any proposal.

        E[log 1/n Σ_i w(x_i)]  ≤  log Z  ≤  E[log 1/n (w(x*) + Σ_{i<n} w(x_i))],    x_i ~ q,  x* ~ π*

    Unlike an effective sample size, the upper bound detects completions that the proposal never draws.

    Args:
        log_weights (`Tensor` (P, n)):
            log of P/q at draws from q, nats.
        exact_log_weights (`Sequence[Tensor]`):
            log of P/q at exact draws from the posterior, any number of them for each of the P prompts; the bound is
            the mean over them.

    Raises:
        ValueError: if a prompt has no exact draw.

    Source: Burda et al. 2016, arXiv 1509.00519, theorem 1; Grosse, Ghahramani & Adams 2015, arXiv 1511.02543, section
    4, for one step.
    """
    missing = [row for row, exact in enumerate(exact_log_weights) if exact.numel() == 0]
    if missing:
        raise ValueError(
            f"`exact_log_weights` must hold at least one draw for each prompt, got none for prompt {missing[0]} "
            f"({len(missing)} of {len(exact_log_weights)}). Let the sampler draw longer, or leave these prompts out."
        )
    log_weights = log_weights.double()
    log_n = math.log(log_weights.size(1))
    lower = log_weights.logsumexp(-1) - log_n  # (P,)
    others = log_weights[:, 1:].logsumexp(-1)  # (P,)
    upper = [
        (torch.logaddexp(exact.double(), rest) - log_n).mean()
        for exact, rest in zip(exact_log_weights, others, strict=True)
    ]
    return LogZSandwich(over_prompts(lower), over_prompts(torch.stack(upper)))


def exact_log_weights(
    exact: Draws, policy: Proposal, posterior: Posterior, columns: Mapping[str, Sequence] | None, prompts: list[Prompt]
) -> list[Tensor]:
    """
    log of P/π at a sampler's draws, one tensor for each prompt.

    Args:
        exact ([`~rlhf_bayes.samplers.Draws`]):
            Exact draws of the posterior.
        policy ([`~rlhf_bayes.samplers.Proposal`]):
            π.
        posterior ([`~rlhf_bayes.Posterior`]):
            The posterior, with the unnormalised density P.
        columns (`Mapping[str, Sequence]`, *optional*):
            Columns of the dataset, an entry for each prompt.
        prompts (`list` of `str` or of chats):
            The prompts that are evaluated.

    Raises:
        ValueError: if the sampler does not draw exactly, or drew for other prompts.
    """
    if exact.guarantee != "exact":
        raise ValueError(
            f"`exact_draws` must come from a sampler that draws exactly, got the guarantee {exact.guarantee!r}: other "
            "draws give no bound. Use a RejectionSampler with a known bound."
        )
    rows = exact.prompt_index.tolist()
    if exact.num_prompts != len(prompts) or any(
        prompts[row] != prompt for row, prompt in zip(rows, exact.prompts, strict=True)
    ):
        raise ValueError("`exact_draws` must be of the prompts that are evaluated, in their order, got others.")
    columns = {name: [values[row] for row in rows] for name, values in (columns or {}).items()}
    log_density = posterior.log_density(exact.prompts, exact.completions, exact.completion_ids, columns)  # (B,)
    log_weights = (log_density - policy.log_prob(exact.prompts, exact.completion_ids).to(log_density.device)).cpu()
    return [log_weights[exact.prompt_index == row] for row in range(len(prompts))]
