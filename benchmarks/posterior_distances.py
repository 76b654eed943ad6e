"""
How far a policy is from a posterior whose log Z comes from many draws of the prior, in plain torch.

`real_posterior.py` uses it rather than the metrics of the trainers that it compares. With ℓ = r/β + log π0 − log π,

    log Z = log mean over draws of the prior of exp(r/β)
    KL(π‖π*) = log Z − E_π[ℓ] + c·(E_π[exp(ℓ)/Z] − 1)           from fresh draws of the policy
    KL(π*‖π) = E_π*[r/β] − log Z + E_π*[log π0 − log π]         by self-normalised weights on draws of the prior

per prompt. The term with c is 0 in expectation. As a control variate it takes away some of the variance; c is
the coefficient of a regression on the draws of all prompts, and at most 1. The first two terms of KL(π*‖π) use all
draws of the prior, the last one the first few of each prompt, because the policy must score them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cached_llama import CachedLlama
from real_tasks import Task
from torch import Tensor

from rlhf_bayes.numerics.jackknife import jackknife

GROUP_SIZES = (2, 8)  # completions of a prompt from which trainers estimate log Z


@dataclass(frozen=True)
class Draws:
    """n completions of each of P prompts."""

    ids: Tensor
    """(P, n, T)."""
    mask: Tensor
    """(P, n, T) bool."""
    log_prob: Tensor
    """(P, n): log-probability under what drew them, nats."""
    log_likelihood: Tensor
    """(P, n): r/β, nats."""

    @classmethod
    def of(
        cls, model: CachedLlama, task: Task, n: int, seed: int, on_prompt: Callable[[], None] = lambda: None
    ) -> "Draws":
        tokenizer, generator = task.load_tokenizer(), torch.Generator().manual_seed(seed)
        columns = []
        for prompt, prompt_ids in zip(task.prompts, prompt_token_ids(task), strict=True):
            drawn = model.draw(prompt_ids, n, generator)
            token_ids = drawn.token_ids()
            texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
            columns.append((*drawn, task.log_likelihood(prompt, texts, token_ids)))
            on_prompt()
        return cls(*(torch.stack(column) for column in zip(*columns, strict=True)))

    def under(self, model: CachedLlama, task: Task, first: int | None = None) -> Tensor:
        """Log-probabilities of the first completions of each prompt under another model: (P, first), nats."""
        rows = zip(prompt_token_ids(task), self.ids[:, :first], self.mask[:, :first], strict=True)
        return torch.stack([model.log_prob(prompt_ids, ids.long(), mask) for prompt_ids, ids, mask in rows])


def prompt_token_ids(task: Task) -> list[list[int]]:
    """Token ids of the prompts, with the special tokens that the tokenizer adds, as TRL has them."""
    return task.load_tokenizer()(task.prompts)["input_ids"]


def prior_draws(
    task: Task, prior: CachedLlama, n: int, path: Path, on_prompt: Callable[[], None] = lambda: None
) -> Draws:
    """n draws of the prior for each prompt, which are kept in a file."""
    if not path.exists():
        draws = Draws.of(prior, task, n, seed=20_000, on_prompt=on_prompt)
        part = path.with_suffix(f".{id(draws)}.part")
        torch.save(asdict(draws) | {"ids": draws.ids.short()}, part)
        part.replace(path)
    return Draws(**torch.load(path, weights_only=True))


@dataclass(frozen=True)
class Reference:
    """What the draws of the prior say of the posterior: (P,) each, nats."""

    log_z: Tensor
    variance: Tensor
    """Of log Z over the draws."""
    ess: Tensor
    """Effective number of draws of the posterior among those of the prior, completions."""
    prior_kl: Tensor
    """KL(π0‖π*)."""
    kl_to_prior: Tensor
    """KL(π*‖π0)."""

    @classmethod
    def of(cls, log_likelihood: Tensor) -> "Reference":
        """From r/β of draws of the prior, (P, n)."""
        n = log_likelihood.size(1)
        log_z = log_likelihood.logsumexp(-1) - math.log(n)
        weights = log_likelihood.softmax(-1)
        ess = 1 / weights.square().sum(-1)
        return cls(
            log_z,
            (1 / ess - 1 / n).clamp(min=0),
            ess,
            log_z - log_likelihood.mean(-1),
            (weights * log_likelihood).sum(-1) - log_z,
        )


def forward_kl(reference: Reference, log_likelihood: Tensor, log_ratio: Tensor) -> Tensor:
    """
    KL(π*‖π) of each prompt: (P,), nats.

    Args:
        reference: of all draws of the prior.
        log_likelihood: (P, m), r/β of the first draws.
        log_ratio: (P, m), log π0 − log π of them.
    """
    return reference.kl_to_prior + (log_likelihood.softmax(-1) * log_ratio).sum(-1)


def reverse_kl(log_z: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """
    KL(π‖π*) of each prompt, and its variance over the draws of the policy: (P,) each, nats.

    Args:
        log_z: (P,).
        log_weights: (P, n), ℓ of draws of the policy.
    """
    log_ratio = log_weights - log_z[:, None]  # log π*/π
    ratio = log_ratio.exp()
    residual, centred = ((x - x.mean(-1, keepdim=True)) for x in (log_ratio, ratio))
    total = centred.square().sum()
    # 0 where π is π*; more than 1 only where all ratios are near 0, which is no ground for a regression
    slope = ((residual * centred).sum() / total).clamp(max=1.0) if total > 0 else total
    terms = slope * (ratio - 1) - log_ratio
    return terms.mean(-1), terms.var(-1) / terms.size(-1)


def batch_log_z(log_weights: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """
    Mean of the log Z that trainers estimate from groups of `size` draws of the policy: (P,) each, nats.

    As it is, and with the jackknife's correction of its bias.

    Args:
        log_weights: (P, n), ℓ of draws of the policy.
    """
    groups = log_weights.unfold(-1, size, size)  # (P, n / size, size)

    def log_z(kept: list[Tensor]) -> Tensor:
        return groups[..., kept[0]].logsumexp(-1) - math.log(len(kept[0]))

    return log_z([torch.arange(size)]).mean(-1), jackknife(log_z, [size])[0].mean(-1)


@dataclass(frozen=True)
class Distances:
    """A policy against a posterior: one number for each prompt, nats but for the reward."""

    gap: list[float]
    """KL(π‖π*)."""
    variance: list[float]
    """Of the gap, over the draws of the policy and of the prior."""
    forward_kl: list[float] | None
    """KL(π*‖π)."""
    forward_ess: float | None
    """Effective number of draws of the posterior in E_π*[log π0 − log π], mean over prompts."""
    reward: list[float]
    kl_to_prior: list[float]
    """KL(π‖π0)."""
    batch_log_z_error: dict[str, list[float]]
    """Error of the log Z that trainers estimate from 2 or 8 draws of the policy, as it is and with the jackknife."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def distances(
    policy: CachedLlama, prior: CachedLlama, task: Task, from_prior: Draws, *, n: int, forward_draws: int, seed: int
) -> Distances:
    """
    How far a policy is from the posterior.

    Args:
        policy, prior: the models.
        task: the posterior.
        from_prior: draws of the prior.
        n: fresh draws of the policy for each prompt.
        forward_draws: draws of the prior for each prompt that the policy scores; with 0 there is no KL(π*‖π).
        seed: of the fresh draws.
    """
    reference = Reference.of(from_prior.log_likelihood)
    drawn = Draws.of(policy, task, n, seed)
    log_ratio = drawn.log_prob - drawn.under(prior, task)  # (P, n): log π − log π0
    log_weights = drawn.log_likelihood - log_ratio
    forward = forward_ess = None
    if forward_draws:
        evidence = from_prior.log_likelihood[:, :forward_draws]
        ratio = from_prior.log_prob[:, :forward_draws] - from_prior.under(policy, task, forward_draws)
        forward = forward_kl(reference, evidence, ratio).tolist()
        forward_ess = (1 / evidence.softmax(-1).square().sum(-1)).mean().item()
    gap, variance = reverse_kl(reference.log_z, log_weights)
    errors = {}
    for size in GROUP_SIZES:
        plain, corrected = batch_log_z(log_weights, size)
        errors[f"{size}"] = (plain - reference.log_z).tolist()
        errors[f"{size}, jackknife"] = (corrected - reference.log_z).tolist()
    return Distances(
        gap=gap.tolist(),
        variance=(reference.variance + variance).tolist(),
        forward_kl=forward,
        forward_ess=forward_ess,
        reward=(task.beta * drawn.log_likelihood.mean(-1)).tolist(),
        kl_to_prior=log_ratio.mean(-1).tolist(),
        batch_log_z_error=errors,
    )


def over_prompts(values: Sequence[float]) -> tuple[float, float]:
    """Mean over prompts, and its standard error clustered by prompt."""
    table = torch.tensor(values, dtype=torch.float64)
    return table.mean().item(), (table.std() / math.sqrt(len(table))).item()
