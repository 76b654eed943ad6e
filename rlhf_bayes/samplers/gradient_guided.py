"""PPLM: decoding with keys and values that are moved along the gradient of an attribute. Experimental."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_bayes.lm import Completions, LanguageModel, Prompt
from rlhf_bayes.lm.decoding import Past, PrefixReader, cache_name
from rlhf_bayes.lm.forward import base_causal_lm
from rlhf_bayes.lm.head import LMHead
from rlhf_bayes.lm.trunk import trunk_of
from rlhf_bayes.numerics import exact_token_kl
from rlhf_bayes.samplers.guided import sample_stepwise, score_stepwise


@final
class GradientGuidedProposal:
    r"""
    PPLM as a proposal: gradients of a head steer the model towards an attribute.

    Before each token, the keys and values of the past are moved for some steps so that the head, which reads the last
    hidden state h, finds its attribute likelier.

        Δ ← Δ + step_size · g / ‖g‖,    g = ∇_Δ [log p(a | h(Δ)) − kl_scale · KL(p_Δ ‖ p)]
        q(x_t | x_<t)  ∝  p_Δ(x_t | x_<t)^fusion · p(x_t | x_<t)^(1 − fusion)

    Δ starts at 0 for each token, so that q is a function of the prefix and its log density is known. So importance
    sampling, rejection, Metropolis–Hastings and SMC can correct for it. In the paper Δ is kept from token to token,
    and the head looks one soft token ahead; here it reads the last state.

    **Experimental.** Each token needs `num_steps` forward and backward passes and two more forward passes, of one
    token with its past. Scoring costs the same.

    Args:
        prior ([`~rlhf_bayes.LanguageModel`]):
            The model to guide. Its cache must hold keys and values of all positions.
        head (`Callable`):
            A differentiable function from hidden states (B, H) to log p(a | h) (B,), nats, row by row.
        num_steps (`int`):
            Steps up the gradient, at least 1.
        step_size (`float`):
            Length of each step, for each layer's keys and values alike.
        kl_scale (`float`):
            Weight of the KL that keeps the perturbed next-token distribution close to the model's.
        fusion (`float`):
            Share of the perturbed distribution, in (0, 1].

    Raises:
        ValueError: if a number is out of range.

    Source: Dathathri et al. 2020 (PPLM), arXiv 1912.02164, section 3.
    """

    def __init__(
        self,
        prior: LanguageModel,
        head: Callable[[Tensor], Tensor],
        num_steps: int = 3,
        step_size: float = 0.02,
        kl_scale: float = 0.01,
        fusion: float = 0.9,
    ):
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(
                f"`num_steps` must be an integer of at least 1, got {num_steps!r}: 0 is the prior itself."
            )
        for name, value, holds in (
            ("step_size", step_size, 0 < step_size < float("inf")),
            ("kl_scale", kl_scale, 0 <= kl_scale < float("inf")),
            ("fusion", fusion, 0 < fusion <= 1),
        ):
            if not holds:
                raise ValueError(
                    f"`{name}` is out of range, got {value}: `step_size` must be positive, `kl_scale` not negative, "
                    "`fusion` in (0, 1]."
                )
        self.prior = prior
        self.head = head
        self.num_steps = num_steps
        self.step_size = step_size
        self.kl_scale = kl_scale
        self.fusion = fusion
        self._reader = PrefixReader(prior)

    def sample(self, prompts: Sequence[Prompt], n: int = 1, generator: torch.Generator | None = None) -> Completions:
        """n completions for each of P prompts, P · n rows; their `token_log_probs` are those of q."""
        return sample_stepwise(self, prompts, n, generator)

    def log_prob(self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """
        log q of each completion: (B,), nats.

        Raises:
            ValueError: if ids are not a whole completion.
        """
        return score_stepwise(self, prompts, completion_ids)

    def next_log_probs(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], log_prior: Tensor
    ) -> Tensor:
        """log q of each next token of B prefixes of one length: (B, V), nats, given log π0 of each, (B, V)."""
        past = self._reader.past(prompts, prefixes)
        if past.mask.size(1) == 1:
            return log_prior  # the first token has no past to move
        prompt_ids = self.prior.prompt_token_ids(list(prompts))
        last = [prefix[-1] if prefix else ids[-1] for prefix, ids in zip(prefixes, prompt_ids, strict=True)]
        tokens = torch.tensor(last, device=log_prior.device)  # (B,)
        perturbed = self._head().log_softmax(self._pushed(past, tokens, log_prior))
        fused = self.fusion * perturbed + (1 - self.fusion) * log_prior
        return fused.log_softmax(-1)

    def _pushed(self, past: Past, tokens: Tensor, log_prior: Tensor) -> Tensor:
        """The last hidden states after the steps: (B, H)."""
        with torch.enable_grad():
            deltas = [torch.zeros_like(part, requires_grad=True) for layer in past.layers for part in layer]
            for _ in range(self.num_steps):
                hidden = self._hidden(past, deltas, tokens)
                log_attribute = self._checked(self.head(hidden), len(tokens))
                kl = exact_token_kl(self._head().log_softmax(hidden), log_prior)
                # rows are independent, so the gradient of the sum holds each row's own gradient
                gradients = torch.autograd.grad((log_attribute - self.kl_scale * kl).sum(), deltas)
                deltas = [
                    (delta + self.step_size * _unit(gradient)).detach().requires_grad_()
                    for delta, gradient in zip(deltas, gradients, strict=True)
                ]
        with torch.no_grad():
            return self._hidden(past, deltas, tokens)

    def _hidden(self, past: Past, deltas: list[Tensor], tokens: Tensor) -> Tensor:
        moved = [
            (keys + delta_k, values + delta_v)
            for (keys, values), delta_k, delta_v in zip(past.layers, deltas[::2], deltas[1::2], strict=True)
        ]
        trunk: Any = trunk_of(base_causal_lm(self.prior.model))
        return trunk(
            input_ids=tokens[:, None],
            attention_mask=past.mask.long(),
            position_ids=past.mask.sum(-1, keepdim=True) - 1,
            use_cache=True,
            **{cache_name(trunk): DynamicCache(ddp_cache_data=moved)},
        ).last_hidden_state[:, -1]

    def _head(self) -> LMHead:
        return LMHead.of(base_causal_lm(self.prior.model), self.prior.temperature)

    def _checked(self, log_attribute: Any, num_rows: int) -> Tensor:
        if not isinstance(log_attribute, Tensor) or log_attribute.shape != (num_rows,):
            raise TypeError(f"`head` must return a tensor of shape ({num_rows},), one number of nats a row.")
        if not bool(log_attribute.isfinite().all()):
            raise ValueError("`head` must return finite numbers, got nan or inf: there is no gradient to follow.")
        return log_attribute


def _unit(gradient: Tensor) -> Tensor:
    """Rows (B, …) scaled to length 1; a row of zeros stays 0."""
    norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-20)
    return gradient / norm.view(-1, *[1] * (gradient.dim() - 1))
