"""One generation loop on transformers' cache: step, reorder, stop.

It serves samplers that look at each token as it is drawn; plain sampling uses `generate`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from rlhf_bayes.lm.adapters import base_causal_lm, described
from rlhf_bayes.lm.completions import Completions, Prompt
from rlhf_bayes.lm.forward import runs_plainly
from rlhf_bayes.lm.head import LMHead
from rlhf_bayes.lm.language_model import LanguageModel, as_completion, pad_ids
from rlhf_bayes.lm.trunk import trunk_of


def cache_name(trunk: Callable[..., Any]) -> str:
    """The name of a trunk's cache argument: `cache`, or in older transformers `past_key_values`."""
    forward = trunk.forward if isinstance(trunk, nn.Module) else trunk
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def check_keeps_cache(lm: LanguageModel) -> None:
    """
    Refuse models that cannot be stepped token by token with a cache, in one batch with prompts of other lengths.

    Raises:
        ValueError: if padding or the cache changes what the model computes, or it reads virtual tokens.
    """
    if runs_plainly(lm.model):
        raise ValueError(
            "The model must compute the same log-probs with padding and a cache as without, to be stepped token by "
            f"token; {described(lm.model)} does not (a recurrent model, one that ignores mask or positions, or a PEFT "
            "prompt of virtual tokens). Sample from it by importance, rejection, best of n or Metropolis–Hastings, "
            "which draw whole completions."
        )


@final
class CachedTrunk:
    """
    Last hidden states of B token sequences that grow one token at a time.

    Args:
        trunk (`Callable`):
            A transformer without its head. It takes `input_ids`, `attention_mask`, `position_ids`, `use_cache` and a
            cache named [`cache_name`], and returns `last_hidden_state` and the cache.
        token_ids (`Sequence[Sequence[int]]`):
            B sequences of at least one token, which are padded on the left.
        device (`torch.device`):
            The device of the trunk.

    Raises:
        ValueError: if the trunk has no cache whose rows can be selected.
    """

    hidden: Tensor
    """(B, H): the last hidden state of each sequence."""
    tokens_evaluated: int
    """Number of tokens run so far, without padding."""

    def __init__(self, trunk: Callable[..., Any], token_ids: Sequence[Sequence[int]], device: torch.device):
        self._trunk = trunk
        self._cache_name = cache_name(trunk)
        self._cache: Any = None
        self.tokens_evaluated = sum(len(ids) for ids in token_ids)
        padded, self._mask = pad_ids(token_ids, "left", device)  # (B, C)
        self._run(padded)
        if not hasattr(self._cache, "reorder_cache"):
            raise ValueError(_no_steps(trunk, f"returns {type(self._cache).__name__} as its cache"))

    def __len__(self) -> int:
        return len(self._mask)

    def append(self, tokens: Tensor) -> None:
        """Add a token (B,) to each sequence."""
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        self._run(tokens[:, None])
        self.tokens_evaluated += len(tokens)

    def select(self, rows: Tensor) -> None:
        """Keep these rows (B′,), in this order; they may repeat."""
        # not `batch_select_indices`: layers with a recurrent state lack it, or select their keys and values only
        self._cache.reorder_cache(rows)
        self._mask, self.hidden = self._mask[rows], self.hidden[rows]

    @torch.no_grad()
    def _run(self, input_ids: Tensor) -> None:
        # positions count only attended tokens, so left padding changes nothing
        positions = (self._mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.size(1) :]  # (B, S)
        outputs = self._trunk(
            input_ids=input_ids,
            attention_mask=self._mask.long(),
            position_ids=positions,
            use_cache=True,
            **{self._cache_name: self._cache},
        )
        self._cache, self.hidden = getattr(outputs, self._cache_name, None), outputs.last_hidden_state[:, -1]


def check_steps(trunk: Callable[..., Any], vocab_size: int, device: torch.device) -> None:
    """
    Refuse a trunk that says other things token by token than in one pass.

    Two sequences of different lengths are read, their rows chosen, and a token appended, as samplers do. A trunk that
    agrees is not run again.

    Raises:
        ValueError: if it keeps no cache, rows of its cache cannot be chosen, or its last hidden states differ.
    """
    if isinstance(trunk, nn.Module) and getattr(trunk, "_steps_agree", False):
        return
    first, second = ([token % vocab_size for token in ids] for ids in ([0, 1, 2, 3], [4]))
    rows = [[*second, first[0]], [*first, second[0]], [*second, first[1]]]
    try:
        cached = CachedTrunk(trunk, [first, second], device)
        cached.select(torch.tensor([1, 0, 1], device=device))
        cached.append(torch.tensor([row[-1] for row in rows], device=device))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(_no_steps(trunk, f"stops: {type(error).__name__}: {error}")) from error
    expected = []
    for row in rows:
        ids = torch.tensor([row], device=device)
        positions = torch.arange(len(row), device=device)[None]
        with torch.no_grad():
            outputs = trunk(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False
            )
        expected.append(outputs.last_hidden_state[0, -1])
    whole = torch.stack(expected)  # (3, H)
    error = ((cached.hidden - whole).abs().max() / whole.abs().max()).item()
    if not error <= (1e-3 if whole.dtype == torch.float32 else 0.1):
        raise ValueError(_no_steps(trunk, f"gives last hidden states that differ by {error:.2g} of their size"))
    if isinstance(trunk, nn.Module):
        trunk._steps_agree = True


def _no_steps(trunk: Callable[..., Any], problem: str) -> str:
    return (
        f"The model must say the same token by token, on a cache whose rows can be chosen, as in one pass; "
        f"{type(trunk).__name__} {problem}. Sample by importance, rejection, best of n or Metropolis–Hastings "
        "instead: they go through `generate`."
    )


@final
class Decoding:
    """
    P · n completions that are being decoded.

        decoding = Decoding(lm, prompts, n)
        while decoding.rows.numel():
            decoding.append(draw_tokens(decoding.log_probs, generator))

    A completion ends with its first EOS or at `max_completion_length`; then its row leaves the forward pass. Each
    prompt is read once, not n times.

    Args:
        lm ([`LanguageModel`]):
            The distribution of the next token.
        prompts (`Sequence` of `str` or of chats):
            P prompts.
        n (`int`):
            Completions for each prompt. Rows are grouped by prompt.
    """

    rows: Tensor
    """(A,): the unfinished rows, ascending. Tensors (A, …) below are in their order."""
    length: int
    """Number of tokens that each unfinished row has."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[Prompt], n: int = 1):
        check_keeps_cache(lm)
        self.lm = lm
        self.prompts = [prompt for prompt in prompts for _ in range(n)]
        self.length = 0
        causal_lm = base_causal_lm(lm.model)
        trunk = trunk_of(causal_lm)
        check_steps(trunk, causal_lm.config.get_text_config().vocab_size, lm.device)
        self._head = LMHead.of(causal_lm, lm.temperature)
        self._eos = torch.tensor(lm.eos_token_ids, device=lm.device)
        self._trunk = CachedTrunk(trunk, lm.prompt_token_ids(prompts), lm.device)
        self.rows = torch.arange(len(self.prompts), device=lm.device)
        self._ids = self.rows.new_zeros(len(self.prompts), lm.max_completion_length)  # (B, T)
        self._lengths = torch.zeros_like(self.rows)  # (B,)
        self._slots = self.rows // n  # (B,): the row of the trunk that holds each row's past
        self._log_probs: Tensor | None = None

    @property
    def tokens_evaluated(self) -> int:
        """Number of tokens that the model was run on."""
        return self._trunk.tokens_evaluated

    @property
    def log_probs(self) -> Tensor:
        """(A, V) fp32, nats: log π of each next token."""
        if self._log_probs is None:
            # the model is run here, not in `append`, so that rows dropped since then are not run
            slots = self._slots[self.rows]  # (A,)
            own = torch.arange(len(slots), device=slots.device)
            if len(slots) != len(self._trunk) or not torch.equal(slots, own):
                self._trunk.select(slots)
            self._slots[self.rows] = own
            if self.length:
                self._trunk.append(self._ids[self.rows, self.length - 1])
            with torch.no_grad():
                self._log_probs = self._head.log_softmax(self._trunk.hidden)
        return self._log_probs

    def append(self, tokens: Tensor) -> Tensor:
        """
        Add a token (A,) to each unfinished row.

        Returns:
            `Tensor` (A,) bool: which of them the token finished.
        """
        self.log_probs  # noqa: B018  runs the model on the last token, if that was not done yet
        self._ids[self.rows, self.length] = tokens
        self.length += 1
        self._lengths[self.rows] = self.length
        finished = torch.isin(tokens, self._eos) | (self.length == self.lm.max_completion_length)
        self.rows, self._log_probs = self.rows[~finished], None
        return finished

    def reorder(self, index: Tensor) -> None:
        """Make row i a copy of row `index[i]`, finished or not: (B,). Both must belong to the same prompt."""
        unfinished = torch.zeros_like(self._lengths, dtype=torch.bool)
        unfinished[self.rows] = True
        self._ids, self._lengths, self._slots = self._ids[index], self._lengths[index], self._slots[index]
        self.rows, self._log_probs = unfinished[index].nonzero().flatten(), None

    def token_ids(self, rows: Tensor | None = None) -> list[list[int]]:
        """The tokens so far, of all rows or of the given ones."""
        ids, lengths = (self._ids, self._lengths) if rows is None else (self._ids[rows], self._lengths[rows])
        width = int(lengths.max()) if lengths.numel() else 0
        return [row[:length] for row, length in zip(ids[:, :width].tolist(), lengths.tolist(), strict=True)]

    def completions(self, token_log_probs: Tensor) -> Completions:
        """The finished completions, with the log-probabilities (B, T) that their tokens were drawn with."""
        ids = self.token_ids()
        width = max(len(row) for row in ids)
        mask = torch.arange(width, device=self._ids.device) < self._lengths[:, None]  # (B, T)
        tokenizer: Any = self.lm.tokenizer
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        last = self._ids.gather(1, self._lengths[:, None] - 1).squeeze(1)  # (B,)
        return Completions(
            prompts=self.prompts,
            completion_ids=ids,
            texts=texts,
            completions=[as_completion(prompt, text) for prompt, text in zip(self.prompts, texts, strict=True)],
            mask=mask,
            token_log_probs=torch.where(mask, token_log_probs[:, :width], 0.0),
            ended=torch.isin(last, self._eos),
        )


class PrefixStates(NamedTuple):
    """States and log-probabilities of a language model at B prefixes."""

    hidden: Tensor
    """(B, H): last hidden state."""
    log_prob: Tensor
    """(B,) fp32, nats: log π(prefix | prompt)."""


class Past(NamedTuple):
    """Keys and values of B sequences before their last token."""

    layers: list[tuple[Tensor, Tensor]]
    """A pair (B, heads, C − 1, size) for each layer."""
    mask: Tensor
    """(B, C) bool: mask of the tokens, including the last one."""


@final
class PrefixReader:
    """
    A language model's states at any prefixes; it is fast if each is one token longer than a prefix of the last call.

    It keeps the prefixes of the last call with their cache, and finds parents by their tokens, so that callers need
    not report how they reorder rows. Equal prefixes are read once.

    Args:
        lm ([`LanguageModel`]):
            The model.
        trunk (`Callable`, *optional*):
            Another trunk for the same tokens, which gives the hidden states; `log_prob` is then 0.
    """

    def __init__(self, lm: LanguageModel, trunk: Callable[..., Any] | None = None):
        check_keeps_cache(lm)
        self.lm = lm
        self._plain = trunk is not None
        causal_lm = base_causal_lm(lm.model)
        self._forward = trunk or trunk_of(causal_lm)
        check_steps(self._forward, causal_lm.config.get_text_config().vocab_size, lm.device)
        self._row_of: dict[tuple[str, tuple[int, ...]], int] = {}
        self._log_prob = torch.empty(0)
        self._trunk: Any = None  # CachedTrunk, from the first call on

    def next_log_probs(self, hidden: Tensor) -> Tensor:
        """log π of each next token, nats: (B, H) -> (B, V)."""
        with torch.no_grad():
            return LMHead.of(base_causal_lm(self.lm.model), self.lm.temperature).log_softmax(hidden)

    def read(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> PrefixStates:
        """States after each prefix, which may be empty, of its prompt."""
        lengths = [len(prefix) for prefix in prefixes]
        order, parts = [], []
        for length in sorted(set(lengths)):
            rows = [row for row, own in enumerate(lengths) if own == length]
            keys = [(repr(prompts[row]), tuple(prefixes[row])) for row in rows]
            self._advance_to(keys, {key[0]: prompts[row] for key, row in zip(keys, rows, strict=True)}, length)
            index = torch.tensor([self._row_of[key] for key in keys], device=self.lm.device)
            parts.append(PrefixStates(self._trunk.hidden[index], self._log_prob[index]))
            order += rows
        back = torch.tensor(order).argsort().to(self.lm.device)
        return PrefixStates(*(torch.cat(column)[back] for column in zip(*parts, strict=True)))

    def past(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> "Past":
        """
        The keys and values that the last token of each prompt + prefix attends to, to run that token again.

        The prefixes must have the same length.

        Raises:
            ValueError: if the cache does not hold keys and values of all positions.
        """
        self.read(prompts, prefixes)
        index = [self._row_of[repr(prompt), tuple(ids)] for prompt, ids in zip(prompts, prefixes, strict=True)]
        layers = self._trunk._cache.layers
        if any(type(layer) is not DynamicLayer for layer in layers):
            raise ValueError(
                "The model must keep keys and values of all positions, got a cache of "
                f"{sorted({type(layer).__name__ for layer in layers})}: sliding windows and states cannot be re-run."
            )
        return Past(
            [(layer.keys[index, :, :-1], layer.values[index, :, :-1]) for layer in layers], self._trunk._mask[index]
        )

    def _advance_to(self, keys: list, prompts: dict[str, Prompt], length: int) -> None:
        def known(to: int) -> bool:
            return all((prompt, prefix[:to]) in self._row_of for prompt, prefix in keys)

        if known(length):
            return
        if length == 0 or not known(length - 1):
            ids = self.lm.prompt_token_ids(list(prompts.values()))
            self._trunk = CachedTrunk(self._forward, ids, self.lm.device)
            self._row_of = {(prompt, ()): row for row, prompt in enumerate(prompts)}
            self._log_prob = torch.zeros(len(ids), device=self.lm.device)
        start = len(next(iter(self._row_of))[1])
        for to in range(start + 1, length + 1):
            self._step(list(dict.fromkeys((prompt, prefix[:to]) for prompt, prefix in keys)))

    def _step(self, keys: list[tuple[str, tuple[int, ...]]]) -> None:
        device = self.lm.device
        parents = torch.tensor([self._row_of[prompt, prefix[:-1]] for prompt, prefix in keys], device=device)
        tokens = torch.tensor([prefix[-1] for _, prefix in keys], device=device)
        self._log_prob = self._log_prob[parents]
        if not self._plain:
            self._log_prob = self._log_prob + self.next_log_probs(self._trunk.hidden)[parents, tokens]
        self._trunk.select(parents)
        self._trunk.append(tokens)
        self._row_of = {key: row for row, key in enumerate(keys)}


def joined(parts: Sequence[Completions]) -> Completions:
    """One [`Completions`] with the rows of several, in order."""
    width = max(part.mask.size(1) for part in parts)

    def padded(columns: list[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(column, (0, width - column.size(1))) for column in columns])

    return Completions(
        prompts=[prompt for part in parts for prompt in part.prompts],
        completion_ids=[ids for part in parts for ids in part.completion_ids],
        texts=[text for part in parts for text in part.texts],
        completions=[completion for part in parts for completion in part.completions],
        mask=padded([part.mask for part in parts]),
        token_log_probs=padded([part.token_log_probs for part in parts]),
        ended=torch.cat([part.ended for part in parts]),
    )


def draw_tokens(log_probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token from each distribution: (A, V), nats -> (A,)."""
    return torch.multinomial(log_probs.exp(), 1, generator=generator).squeeze(1)


def generator_on(device: torch.device, generator: torch.Generator | None) -> torch.Generator | None:
    """The generator if it is on the device, otherwise a new one there that it seeds."""
    if generator is None or generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)
