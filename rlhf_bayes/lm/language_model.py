"""A causal LM as a distribution over completions, which draws, scores, and is tilted into a posterior."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.completions import Completion, Completions, Prompt
from rlhf_bayes.lm.forward import enable_completion_scoring, runs_plainly, score_completions
from rlhf_bayes.lm.generation import draw_plainly, first_eos_mask, raw_generation_config, sampling_config
from rlhf_bayes.lm.pretrained import load_causal_lm, tokenizer_folder, whole_weights
from rlhf_bayes.lm.prompt_ids import check_reads_text, check_texts, ends_texts_with_eos, without_final_eos
from rlhf_bayes.notebook import Described
from rlhf_bayes.numerics.masked import masked_sum

if TYPE_CHECKING:
    from rlhf_bayes.posterior import Posterior


class LanguageModel(Described):
    """
    A causal LM as a distribution over completions.

        log π(x | prompt) = Σ_t log π(x_t | prompt, x_<t),   x ends with the first EOS or at `max_completion_length`

    Completions that are cut are ordinary members of the support. The model is put in evaluation mode, since dropout
    would make the density random.

    Args:
        model_or_path (`str`, `Path` or `PreTrainedModel` or `PeftModel`):
            The model, or the path to load it from in fp32: a folder of a model or of a PEFT adapter, or a repository.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Default: the one saved beside the model. Its padding side is not changed: prompts are padded
            on the left here.
        max_completion_length (`int`):
            Longest completion, in tokens, EOS included.
        temperature (`float`):
            Divides the logits at each token. It is part of the distribution.
        batch_size (`int`):
            Sequences in one forward pass; changes memory, not results.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of the chat template, for instance `{"enable_thinking": False}`, as in TRL's
            configurations. They are part of the prompt.

    Raises:
        ValueError: if the tokenizer has no EOS or is a processor of images, a number is out of range, or the model is
            no causal LM or cannot be read whole (see [`load_causal_lm`] and [`enable_completion_scoring`]).
    """

    def __init__(
        self,
        model_or_path: "str | Path | PreTrainedModel",
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_completion_length: int = 64,
        temperature: float = 1.0,
        batch_size: int = 64,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        for name, value in (("max_completion_length", max_completion_length), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}: it divides the logits.")
        if isinstance(model_or_path, str | Path):
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(model_or_path))
            with whole_weights():
                model = load_causal_lm(model_or_path, dtype=torch.float32)
        else:
            model = model_or_path
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
        check_reads_text(model, tokenizer)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.batch_size = batch_size
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        enable_completion_scoring(model)
        self.eos_token_ids = eos_token_ids(base_causal_lm(model), tokenizer)

    def _facts(self) -> dict[str, Any]:
        base = base_causal_lm(self.model)
        return {
            "model": Path(getattr(base.config, "_name_or_path", "")).name or None,
            "kind": type(base).__name__,
            "parameters": f"{sum(p.numel() for p in base.parameters()):,}",
            "max_completion_length": self.max_completion_length,
            "temperature": self.temperature,
        }

    @property
    def device(self) -> torch.device:
        """The device of the model, on which results are returned."""
        return base_causal_lm(self.model).device

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], n: int = 1, generator: torch.Generator | None = None) -> Completions:
        """
        Draw n completions for each prompt.

        The log-probabilities come from a teacher-forced pass, like those of [`LanguageModel.log_prob`]. Cached
        generation uses other kernels, whose log-probabilities differ by more than rounding.

        Args:
            prompts (`Sequence` of `str` or of chat messages):
                P prompts.
            n (`int`):
                Completions for each prompt.
            generator (`torch.Generator`, *optional*):
                Makes the draws reproducible, and leaves the global random state unchanged. Default: the global state.

        Returns:
            [`Completions`] with B = P · n rows.
        """
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"`n` must be an integer of at least 1, got {n!r}.")
        rows = [prompt for prompt in _checked_prompts(prompts) for _ in range(n)]
        prompt_ids = self.prompt_token_ids(rows)
        with seeded_by(generator, self.device), raw_generation_config(self.model):
            completion_ids, engine_log_prob = self._drawn(prompt_ids)
        token_log_probs, mask = self._score(prompt_ids, completion_ids)
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        eos = set(self.eos_token_ids)
        return Completions(
            prompts=rows,
            completion_ids=completion_ids,
            texts=texts,
            completions=[as_completion(prompt, text) for prompt, text in zip(rows, texts, strict=True)],
            mask=mask,
            token_log_probs=token_log_probs,
            ended=torch.tensor([ids[-1] in eos for ids in completion_ids], device=self.device),
            engine_log_prob=engine_log_prob,
        )

    def log_prob(self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """
        log π(x | prompt) of each row: (B,), fp32, nats, without gradient.

        Args:
            prompts (`Sequence` of `str` or of chat messages):
                B prompts, one for each completion.
            completion_ids (`Sequence[Sequence[int]]`):
                B completions: token ids up to and including the first EOS, or `max_completion_length` tokens.

        Raises:
            ValueError: if a completion is empty, goes on after EOS, is too long, or stops early without EOS (it is
                then a prefix, not a member of the support).
        """
        token_log_probs, mask = self.token_log_probs(prompts, completion_ids)
        return masked_sum(token_log_probs, mask, dim=-1)

    @torch.no_grad()
    def token_log_probs(
        self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """log π(x_t | prompt, x_<t) (B, T), nats, and the mask (B, T) of the completion's tokens. See `log_prob`."""
        prompts = _checked_prompts(prompts)
        if len(prompts) != len(completion_ids):
            raise ValueError(
                f"`prompts` and `completion_ids` must have one entry a row, got {len(prompts)} and "
                f"{len(completion_ids)}."
            )
        for row, ids in enumerate(completion_ids):
            self._check_completion(row, ids)
        return self._score(self.prompt_token_ids(prompts), completion_ids)

    def tilt(self, reward_funcs: Any, beta: float, **options: Any) -> "Posterior":
        """π*(x | c) ∝ π(x | c)·exp(r(c, x)/β): see [`~rlhf_bayes.posterior.tilt`], which takes the options."""
        # an import from a higher layer, made only when called: users start from the prior
        from rlhf_bayes.posterior import tilt

        return tilt(self, reward_funcs, beta, **options)

    def condition(self, predicate: Any) -> "Posterior":
        """π*(x | c) ∝ π(x | c)·b(c, x), b in {0, 1}: see [`~rlhf_bayes.posterior.condition`]."""
        from rlhf_bayes.posterior import condition

        return condition(self, predicate)

    def constrain(self, constraints: Any, prompts: Sequence[Prompt], **options: Any) -> "Posterior":
        """
        π*(x | c) ∝ π(x | c)·exp(λ·φ(c, x)), with the λ that gives each feature φ its mean.

        For example `constrain({"animal": (mentions_animal, 0.5)}, prompts)`: the mean is over the completions of these
        prompts. See [`~rlhf_bayes.posterior.constrain`], which takes the options.
        """
        from rlhf_bayes.posterior import constrain

        return constrain(self, constraints, prompts, **options)

    def prompt_token_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """
        Token ids of prompts, as TRL makes them.

        A text gets its special tokens, messages the chat template with its generation prompt. An EOS that the
        tokenizer puts after a text is left out: no completion follows an end.

        Raises:
            ValueError: if prompt and longest completion do not fit the model's context, or a prompt has no token.
        """
        texts = [row for row, prompt in enumerate(prompts) if isinstance(prompt, str)]
        chats = [row for row, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        ids: dict[int, list[int]] = {}
        if texts:
            encoded = self.tokenizer([prompts[row] for row in texts])["input_ids"]
            if ends_texts_with_eos(self.tokenizer):
                encoded = [without_final_eos(row, self.tokenizer) for row in encoded]
            ids |= dict(zip(texts, encoded, strict=True))
        if chats:
            encoded = self.tokenizer.apply_chat_template(
                [prompts[row] for row in chats],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self.chat_template_kwargs,
            )
            ids |= dict(zip(chats, encoded["input_ids"], strict=True))
        for row, prompt in ids.items():
            check_prompt_fits(base_causal_lm(self.model), len(prompt), self.max_completion_length, row)
        return [ids[row] for row in range(len(prompts))]

    def generate_ids(self, prompt_ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """
        One pass of `generate`: the token ids that follow B token sequences, up to and including the first EOS.

        The caller holds [`raw_generation_config`] and the seed.
        """
        if runs_plainly(self.model):
            return draw_plainly(self.model, prompt_ids, max_new_tokens, self.eos_token_ids, self.temperature)
        padded, mask = pad_ids(prompt_ids, "left", self.device)
        pad_token_id = self.tokenizer.pad_token_id
        config = sampling_config(
            max_new_tokens,
            self.eos_token_ids,
            self.eos_token_ids[0] if pad_token_id is None else pad_token_id,
            self.temperature,
        )
        output = self.model.generate(input_ids=padded, attention_mask=mask.long(), generation_config=config)
        completion_ids = output[:, padded.size(1) :]  # (B, T)
        kept = first_eos_mask(completion_ids, self.eos_token_ids)
        return [ids[keep].tolist() for ids, keep in zip(completion_ids, kept, strict=True)]

    def _drawn(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], Tensor | None]:
        """A completion of each prompt, and log q of each, (B,), nats, where an engine with its own log-probs drew."""
        completion_ids: list[list[int]] = []
        for start in range(0, len(prompt_ids), self.batch_size):
            batch = prompt_ids[start : start + self.batch_size]
            completion_ids += self.generate_ids(batch, self.max_completion_length)
        return completion_ids, None

    def _score(self, prompt_ids: list[list[int]], completion_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(ids) for ids in completion_ids)
        parts, masks = [], []
        for start in range(0, len(prompt_ids), self.batch_size):
            prompts, prompt_mask = pad_ids(prompt_ids[start : start + self.batch_size], "left", self.device)
            completions, mask = pad_ids(completion_ids[start : start + self.batch_size], "right", self.device)
            scores = score_completions(
                self.model, prompts, prompt_mask, completions, mask, self.temperature, with_values=False
            )
            missing = (0, width - mask.size(1))
            parts.append(torch.nn.functional.pad(scores.log_probs, missing))
            masks.append(torch.nn.functional.pad(mask, missing))
        return torch.cat(parts), torch.cat(masks)

    def _check_completion(self, row: int, ids: Sequence[int]) -> None:
        ends = [position for position, token in enumerate(ids) if token in self.eos_token_ids]
        problem = None
        if len(ids) == 0:
            problem = "is empty"
        elif len(ids) > self.max_completion_length:
            problem = f"has {len(ids)} tokens, more than `max_completion_length` = {self.max_completion_length}"
        elif ends and ends[0] != len(ids) - 1:
            problem = f"goes on after the EOS at position {ends[0]}"
        elif not ends and len(ids) < self.max_completion_length:
            problem = f"stops after {len(ids)} tokens without EOS: it is a prefix, not a completion"
        if problem:
            raise ValueError(
                f"`completion_ids` must hold tokens up to and including the first EOS, or `max_completion_length` "
                f"tokens; row {row} {problem}. Cut at the first EOS, or append {self.eos_token_ids[0]}."
            )


def pad_ids(sequences: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """
    Pad token ids into one tensor; returns it with the mask of real tokens, (B, T) each.

    Args:
        sequences (`Sequence[Sequence[int]]`):
            B sequences.
        side (`str`):
            The side that is padded, `"left"` or `"right"`. Padding is masked, so it may be any id of the vocabulary.
        device (`torch.device`):
            The device of the results.
    """
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    mask = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    padded, mask = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side=side) for x in (rows, mask))
    return padded.to(device), mask.to(device)


def as_completion(prompt: Prompt, text: str) -> Completion:
    """A completion in the prompt's own form: a text, or one assistant message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    The tokens that end a completion.

    First the tokenizer's EOS, then every other that the model's generation config declares.

    Raises:
        ValueError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"`tokenizer` must have an EOS token, got {type(tokenizer).__name__} with `eos_token=None`: no completion "
            "would ever end. Set `tokenizer.eos_token` to the token that closes a text in the model's training data."
        )
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return [tokenizer.eos_token_id, *(token for token in declared if token != tokenizer.eos_token_id)]


def check_prompt_fits(model: PreTrainedModel, prompt_length: int, max_completion_length: int, row: int) -> None:
    """
    Refuse a prompt that leaves no room for a completion.

    Args:
        model (`PreTrainedModel`):
            The model, whose config gives the number of positions.
        prompt_length, max_completion_length (`int`):
            Length of the prompt and of the longest completion, in tokens.
        row (`int`):
            Index of the prompt, for the message.

    Raises:
        ValueError: if the prompt has no token, or prompt + completion exceed the model's positions.
    """
    if prompt_length == 0:
        raise ValueError(
            f"Each prompt must have at least one token, prompt {row} has none. Add a BOS token or text, or drop the "
            "row."
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt_length + max_completion_length > context:
        raise ValueError(
            f"Prompt and completion must fit the model's context of {context} tokens: prompt {row} has "
            f"{prompt_length} tokens and `max_completion_length` is {max_completion_length}. Shorten or drop the "
            "prompt, or lower `max_completion_length`."
        )


def _checked_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"`prompts` must be a non-empty list of texts or of chats, got {prompts!r}.")
    check_texts(prompts, "a `LanguageModel`")
    return list(prompts)


@contextmanager
def seeded_by(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """A context in which the global random state is seeded by a generator: `generate` draws from no other."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
