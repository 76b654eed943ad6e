"""Rollouts on the enumerable toy, drawn from exact tables, and the gradients of an objective. Not a test module."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_bayes.lm import enable_completion_scoring, score_completions
from rlhf_bayes.lm.forward import scatter
from rlhf_bayes.lm.language_model import pad_ids
from rlhf_bayes.objectives import Batch, Objective, OneProcess, PosteriorTarget, Rollout
from rlhf_bayes.testing import EnumerableLM


def world_of(policy: nn.Module, max_steps: int = 10, temperature: float = 1.0) -> OneProcess:
    """One process, whose policy is this model."""
    enable_completion_scoring(policy)

    def log_probs(batch: Batch) -> Tensor:
        scores = score_completions(policy, *batch.sequences, temperature)
        return scores.within(batch.policy_mask).log_probs.sum(-1)

    return OneProcess(log_probs, max_steps)


def rollout_of(
    toy: EnumerableLM,
    policy: nn.Module,
    prior: nn.Module,
    columns: Tensor,
    rewards: Tensor,
    log_proposal: Tensor | None = None,
    drawn_from: str = "policy",
    states: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """
    The rollout of completions that have been chosen.

    Args:
        columns (`Tensor` (P, n)): for each prompt, which of the toy's completions.
        rewards (`Tensor` (P, N)): r of all completions.
        log_proposal (`Tensor` (P, N), *optional*): log q of all completions; by default log π.
        states (`Callable`, *optional*): the objective's `states`.
    """
    for model in (policy, prior):
        enable_completion_scoring(model)
    prompts, n = len(columns), columns.size(1)
    prompt_ids = [toy.tokenizer(prompt)["input_ids"] for prompt in toy.prompts[:prompts] for _ in range(n)]
    padded_prompts, prompt_mask = pad_ids(prompt_ids, "left", torch.device("cpu"))
    completion_ids = [toy.completion_ids[index] for index in columns.flatten().tolist()]
    padded, mask = pad_ids(completion_ids, "right", torch.device("cpu"))
    sequences = (padded_prompts, prompt_mask, padded, mask)
    with torch.no_grad():
        scores, ref_scores = (
            score_completions(model, *sequences, toy.temperature, with_hidden=True) for model in (policy, prior)
        )
    log_q = scores.log_probs.sum(-1) if log_proposal is None else log_proposal.gather(1, columns).flatten()
    return Rollout(
        *sequences,
        prompt_keys=torch.arange(prompts).repeat_interleave(n),
        token_log_probs=scores.log_probs,
        ref_token_log_probs=ref_scores.log_probs,
        token_entropy=scores.entropy,
        values=scores.values,
        log_proposal=log_q,
        rewards=rewards[:prompts].gather(1, columns).flatten(),
        num_generations=n,
        drawn_from=drawn_from,
        states=None if states is None else scatter(states(scores.hidden), mask.bool()),
    )


def drawn(log_probs: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Columns (P, n) drawn from the table log_probs (P, N)."""
    return torch.multinomial(log_probs.exp(), n, replacement=True, generator=generator)


def know_log_z(target: PosteriorTarget, log_zs: Tensor) -> None:
    """Give the target log Z of the prompts 0, 1, … (P,), nats, beyond what any draw could change."""
    entries = {str(key): [log_z + 60.0, 60.0, 1e20, 10**20, 1.0] for key, log_z in enumerate(log_zs.tolist())}
    target.normalizers.pool.load_state_dict({"log_z_bound": target.normalizers.bound, "entries": entries})


def gradient_of(
    objective: Objective,
    policy: nn.Module,
    rollout: Rollout,
    temperature: float = 1.0,
    micro_batches: Sequence[int] = (),
    first_step: bool = True,
) -> Tensor:
    """The gradient of one optimizer step on a rollout, flat: (D,). The critic's weights are left out."""
    batch: Any = objective.batch(rollout)
    batches = batch.split(micro_batches) if micro_batches else [batch]
    step = objective.step(batches, batches if first_step else None)
    count = sum(objective.count(batch) for batch in step.batches)
    policy.zero_grad()
    for batch in step.batches:
        loss, _ = objective.loss(score_completions(policy, *batch.sequences, temperature), batch)
        (loss / count).backward()
    return flat_gradients(policy)


def flat_gradients(policy: nn.Module) -> Tensor:
    """(D,): 0 where a parameter has none."""
    parameters = [parameter for name, parameter in policy.named_parameters() if "critic" not in name]
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
