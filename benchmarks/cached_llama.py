"""
Draws and scores many completions of a prompt with a causal LM of Llama's kind, in plain torch with a static cache.

`real_posterior.py` draws its verdicts by it: transformers' `generate` is several times slower on models this small. It
reads the weights of `LlamaForCausalLM` and `BitNetForCausalLM` (the same with two more norms), fp32, on the CPU, and
`check` compares it with the model's own logits. A completion ends with its first EOS or after `length` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOLERANCE = 1e-5  # nats a token, mean absolute difference of log-probabilities
ROWS = 512  # completions that are drawn or scored at once


class Drawn(NamedTuple):
    """Completions of one prompt."""

    ids: Tensor
    """(N, T): tokens; 0 after the end."""
    mask: Tensor
    """(N, T) bool: whether a token belongs to the completion, its first EOS included."""
    log_prob: Tensor
    """(N,), nats, fp64."""

    def token_ids(self) -> list[list[int]]:
        return [row[kept].tolist() for row, kept in zip(self.ids, self.mask, strict=True)]


@dataclass(frozen=True)
class _Layer:
    """The weights of a layer; projections with the same input are one matrix."""

    attention_norm: Tensor
    query_key_value: Tensor
    attention_sub_norm: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    mlp_sub_norm: Tensor | None
    down: Tensor

    @classmethod
    def of(cls, layer: nn.Module) -> "_Layer":
        attention, mlp = layer.self_attn, layer.mlp
        query_key_value = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
        sub_norms = (getattr(part, name, None) for part, name in ((attention, "attn_sub_norm"), (mlp, "ffn_sub_norm")))
        first, second = (None if norm is None else norm.weight.detach() for norm in sub_norms)
        return cls(
            layer.input_layernorm.weight.detach(),
            torch.cat(query_key_value).detach(),
            first,
            attention.o_proj.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach(),
            second,
            mlp.down_proj.weight.detach(),
        )


class CachedLlama:
    """
    A causal LM whose weights are read once; make a new one when they have changed.

    Args:
        model (`LlamaForCausalLM` or `BitNetForCausalLM`): in fp32 on the CPU, with the activation SiLU and no biases.
        eos_id (`int`): the token that ends a completion.
        length (`int`): tokens after which a completion ends.

    Raises:
        ValueError: if the model is of another kind, or its logits differ by more than 1e-5 nats.
    """

    def __init__(self, model: nn.Module, eos_id: int, length: int):
        config = model.config
        if config.model_type not in ("llama", "bitnet") or config.hidden_act != "silu":
            raise ValueError(f"`model` must be a Llama or BitNet with SiLU, got {config.model_type!r}.")
        self.model, self.eos_id, self.length = model, eos_id, length
        self.layers = [_Layer.of(layer) for layer in model.model.layers]
        self.embedding, self.head = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
        self.norm, self.eps = model.model.norm.weight.detach(), config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        positions = torch.arange(config.max_position_embeddings)[None]
        cos, sin = model.model.rotary_emb(self.embedding, positions)
        self.cos, self.sin = cos[0], sin[0]  # (positions, D)

    @torch.no_grad()
    def check(self, prompt_ids: Sequence[int]) -> None:
        """Draws eight completions, and compares their log-probs with those of the model's own forward."""
        drawn = self.draw(prompt_ids, 8, torch.Generator().manual_seed(0))
        ids = torch.cat([torch.tensor([list(prompt_ids)]).expand(8, -1), drawn.ids], 1)
        was_training = self.model.training
        logits = self.model.eval()(input_ids=ids, use_cache=False).logits[:, len(prompt_ids) - 1 : -1]
        self.model.train(was_training)
        theirs = _chosen(logits, drawn.ids)  # (8, T)
        ours = self._token_log_probs(prompt_ids, drawn.ids)
        # means over tokens: fp32 may be off by more at a single token that has little probability
        tokens = drawn.mask.sum()
        by_token = ((theirs - ours).abs() * drawn.mask).sum().item() / tokens
        by_draw = ((theirs * drawn.mask).sum(-1) - drawn.log_prob).abs().sum().item() / tokens
        if not max(by_token, by_draw) < TOLERANCE:
            raise ValueError(
                f"`model` must be computed as transformers computes it, to {TOLERANCE} nats a token, got a difference "
                f"of {by_token:.1e} when scoring and {by_draw:.1e} when drawing: its class does something that "
                "`CachedLlama` does not do."
            )

    @torch.no_grad()
    def draw(self, prompt_ids: Sequence[int], n: int, generator: torch.Generator) -> Drawn:
        """n completions of a prompt, at temperature 1 from the whole vocabulary."""
        parts = [self._draw(prompt_ids, min(ROWS, n - start), generator) for start in range(0, n, ROWS)]
        return Drawn(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    @torch.no_grad()
    def log_prob(self, prompt_ids: Sequence[int], ids: Tensor, mask: Tensor) -> Tensor:
        """log π of completions (N, T) of a prompt: (N,), nats, fp64."""
        parts = [self._token_log_probs(prompt_ids, rows) for rows in ids.split(ROWS)]
        return torch.where(mask, torch.cat(parts), 0.0).sum(-1)

    def _draw(self, prompt_ids: Sequence[int], n: int, generator: torch.Generator) -> Drawn:
        cache = self._cache(len(prompt_ids), n)
        logits = self._forward(torch.tensor([list(prompt_ids)]), 0, [tensor[:, :1] for tensor in cache])[:, -1]
        for tensor in cache:
            tensor[:, 1:] = tensor[:, :1]
        logits = logits.expand(n, -1)
        ids = torch.zeros(n, self.length, dtype=torch.long)
        mask, log_prob = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(n, dtype=torch.float64)
        alive = torch.ones(n, dtype=torch.bool)
        for step in range(self.length):
            if step > 0:
                logits = self._forward(ids[:, step - 1 : step], len(prompt_ids) + step - 1, cache)[:, -1]
            chosen = logits.softmax(-1).multinomial(1, generator=generator)  # (N, 1)
            chosen_log_prob = _chosen(logits, chosen[:, 0])  # (N,)
            ids[:, step] = torch.where(alive, chosen[:, 0], 0)
            mask[:, step] = alive
            log_prob += torch.where(alive, chosen_log_prob, 0.0)
            alive = alive & (chosen[:, 0] != self.eos_id)
            if not alive.any():
                break
        return Drawn(ids, mask, log_prob)

    def _token_log_probs(self, prompt_ids: Sequence[int], ids: Tensor) -> Tensor:
        """log π of each token of completions (N, T), nats, fp64."""
        cache = self._cache(len(prompt_ids), len(ids))
        first = self._forward(torch.tensor([list(prompt_ids)]), 0, [tensor[:, :1] for tensor in cache])[:, -1:]
        for tensor in cache:
            tensor[:, 1:] = tensor[:, :1]
        rest = self._forward(ids[:, :-1], len(prompt_ids), cache)
        return _chosen(torch.cat([first.expand(len(ids), -1, -1), rest], 1), ids)

    def _cache(self, prompt: int, rows: int) -> list[Tensor]:
        """Keys and values of every layer: (2, N, heads, positions, D) each."""
        shape = (2, rows, self.kv_heads, prompt + self.length, self.head_size)
        return [torch.empty(shape) for _ in self.layers]

    def _forward(self, ids: Tensor, start: int, cache: list[Tensor]) -> Tensor:
        """Logits (N, T, V) of tokens (N, T) at positions from `start` on, whose keys and values go into the cache."""
        x = self.embedding[ids]  # (N, T, H)
        rows, tokens = ids.shape
        end = start + tokens
        cos, sin = self.cos[start:end], self.sin[start:end]
        mask = torch.ones(tokens, end, dtype=torch.bool).tril(start) if tokens > 1 else None
        sizes = [heads * self.head_size for heads in (self.heads, self.kv_heads, self.kv_heads)]
        for layer, stored in zip(self.layers, cache, strict=True):
            projected = F.linear(self._norm(x, layer.attention_norm), layer.query_key_value).split(sizes, -1)
            query, key, value = (part.view(rows, tokens, -1, self.head_size).transpose(1, 2) for part in projected)
            stored[0, :, :, start:end] = _rotated(key, cos, sin)
            stored[1, :, :, start:end] = value
            attended = F.scaled_dot_product_attention(
                _rotated(query, cos, sin), stored[0, :, :, :end], stored[1, :, :, :end], mask, enable_gqa=True
            )
            attended = attended.transpose(1, 2).reshape(rows, tokens, -1)
            x = x + F.linear(self._norm(attended, layer.attention_sub_norm), layer.output)
            gate, up = F.linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = x + F.linear(self._norm(F.silu(gate) * up, layer.mlp_sub_norm), layer.down)
        return F.linear(self._norm(x, self.norm), self.head)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else F.rms_norm(x, (x.size(-1),), weight, self.eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    """log-softmax at the chosen tokens: (..., V), (...) -> (...), fp64."""
    chosen = logits.gather(-1, ids[..., None])[..., 0]
    return chosen.double() - logits.logsumexp(-1).double()
