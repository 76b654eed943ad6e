"""Draws from tables of enumerated completions, and the exact values of what they estimate. Not a test module."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_bayes.diagnostics import PosteriorFit, ScoredDraws, posterior_fits
from rlhf_bayes.testing import EnumerableLM, toy_reward


@dataclass(frozen=True)
class Population:
    """Prompts of a toy, with the log-probabilities of all N completions under prior and policy."""

    toy: EnumerableLM
    prompts: list[str]
    log_prior: Tensor  # (P, N)
    log_policy: Tensor  # (P, N)
    log_likelihood: Tensor  # (P, N)

    @classmethod
    def of(cls, toy: EnumerableLM, policy: torch.nn.Module, longest: int) -> "Population":
        """All prompts of up to `longest` words."""
        words = toy.tokenizer.convert_ids_to_tokens(range(toy.vocab_size - 2))
        prompts = [" ".join(some) for n in range(1, longest + 1) for some in itertools.product(words, repeat=n)]
        rewards = [toy_reward([p] * len(toy.completions), toy.completions, toy.completion_ids) for p in prompts]
        with torch.no_grad():
            log_prior, log_policy = (toy.log_probs(model, prompts).double() for model in (toy.model, policy))
        return cls(toy, prompts, log_prior, log_policy, torch.tensor(rewards).double() / toy.beta)

    def fits(self, rows: Tensor, n: int, generator: torch.Generator) -> tuple[PosteriorFit, PosteriorFit]:
        """Prior's and policy's, from n draws of each for these prompts."""
        from_prior, index = self._draw(self.log_prior, rows, n, generator)
        from_policy, _ = self._draw(self.log_policy, rows, n, generator)
        under_policy = self.log_policy[rows].gather(1, index)
        return posterior_fits(from_prior, from_policy, under_policy, self.toy.beta)[:2]

    def truths(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the fits estimate, of each prompt: (P,)."""
        return self._truth(self.log_prior), self._truth(self.log_policy)

    def _draw(self, log_q: Tensor, rows: Tensor, n: int, generator: torch.Generator) -> tuple[ScoredDraws, Tensor]:
        index = torch.multinomial(log_q[rows].exp(), n, replacement=True, generator=generator)  # (P, n)
        log_prob, log_prior, evidence = (
            table[rows].gather(1, index) for table in (log_q, self.log_prior, self.log_likelihood)
        )
        ids = [[self.toy.completion_ids[column] for column in row] for row in index.tolist()]
        texts = [["x y"] for _ in ids]  # one: their diversity is not what is enumerated
        prompts = [self.prompts[row] for row in rows.tolist()]
        # no tokens here: KL and entropy by whole completions
        return ScoredDraws(prompts, ids, texts, log_prob, log_prior, evidence, log_prob - log_prior, -log_prob), index

    def _truth(self, log_q: Tensor) -> dict[str, Tensor]:
        log_z = (self.log_prior + self.log_likelihood).logsumexp(-1)
        log_posterior = self.log_prior + self.log_likelihood - log_z[:, None]
        q, posterior, rewards = log_q.exp(), log_posterior.exp(), self.toy.beta * self.log_likelihood
        gap, forward = (q * (log_q - log_posterior)).sum(-1), (posterior * (log_posterior - log_q)).sum(-1)
        return {
            "reward": (q * rewards).sum(-1),
            "kl_to_prior": (q * (log_q - self.log_prior)).sum(-1),
            "elbo": (q * (self.log_likelihood + self.log_prior - log_q)).sum(-1),
            "log_z": log_z,
            "gap": gap,
            "forward_kl": forward,
            "jeffreys": gap + forward,
            "tv": 0.5 * (q - posterior).abs().sum(-1),
            "entropy": -(q * log_q).sum(-1),
            "posterior_reward": (posterior * rewards).sum(-1),
            "posterior_kl_to_prior": (posterior * (log_posterior - self.log_prior)).sum(-1),
        }
