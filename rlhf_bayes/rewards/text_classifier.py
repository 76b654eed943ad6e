"""A sequence classifier on prompts and completions, which tokenises, batches and checks."""

import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from rlhf_bayes.lm.pretrained import has_whole_weights
from rlhf_bayes.lm.prompt_ids import check_texts
from rlhf_bayes.rewards.folding import scale_in_weights
from rlhf_bayes.rewards.index import RewardIndex
from rlhf_bayes.rewards.lengths import LengthLimit, num_positions, shown_rows
from rlhf_bayes.rewards.loading import is_head, load_classifier, load_tokenizer
from rlhf_bayes.rewards.token_trees import (
    TokenTree,
    beginnings_are_shared,
    in_batches,
    token_trees,
    tree_inputs,
)

logger = logging.getLogger(__name__)

_AGREEMENT = 0.02  # of logits of trees and of single texts, in standard deviations; rounding of half precision aside
_ROUNDING = 32  # units of it that logits of several layers may differ by, in standard deviations


@final
class TextClassifier:
    """
    The logits of a sequence-classification model on prompt and completion.

    The text is tokenised with the model's own tokenizer, which may differ from the policy's, as in TRL's
    `RLOOTrainer._calculate_rewards`: prompt and completion are joined (by the chat template, for chats), no special
    tokens are added, and padding is on the right. If the tokenizer has no padding token, its EOS is used, and set in
    the model's config.

    Args:
        model (`torch.nn.Module` or `str` or `Path`):
            The classifier, with a `config`. It is put in evaluation mode, since dropout would make the logits random.
            Or the path to load one from: a whole model, or a PEFT adapter.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The model's tokenizer. Default: the one saved beside the model.
        device (`torch.device`, *optional*):
            Where to put a model that is loaded from a path. A model passed as an instance stays where it is.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts in one forward pass; changes memory, and results by rounding only.
        num_labels (`int`, *optional*):
            Labels of a model that is loaded from a path. Default: as many as its checkpoint has.
        append_eos (`bool`, *optional*):
            Whether plain texts are read as `RewardTrainer` tokenises them, with EOS and special tokens. See
            [`RewardIndex`]. Default: what the index beside the model says, else no.
        dtype (`torch.dtype` or `"auto"`, *optional*):
            Type of the weights of a model that is loaded from a path; see [`load_classifier`]. Default: fp32.
        index ([`RewardIndex`], *optional*):
            How to read the model: a scale in the weights of its head is taken out of the logits. Default: the index
            beside a path, or none.

    Attributes:
        name (`str`): Name of the model, from its path or its class.
        num_labels (`int`): L.
        index ([`RewardIndex`] or None): The index that was passed, or found beside a path.

    Raises:
        `TypeError`: `model` has no `config`.
        `ValueError`: the checkpoint has no classification head, or no tokenizer or padding token is found.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 64,
        num_labels: int | None = None,
        append_eos: bool | None = None,
        dtype: torch.dtype | str = torch.float32,
        index: RewardIndex | None = None,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        self.index, path = index, ""
        if isinstance(model, (str, Path)):
            path = str(model)
            self.index = index or RewardIndex.load(path)
            model = load_classifier(path, num_labels, dtype).to(device or "cpu")
        config: Any = getattr(model, "config", None)
        if config is None:
            raise TypeError(
                "A module in `reward_funcs` must be a sequence-classification model with a `config`, got "
                f"{type(model).__name__}. Wrap it in a function `f(prompts, completions, **kwargs)` that returns a "
                "list of numbers."
            )
        path = path or getattr(config, "_name_or_path", "")
        self.name = path.rstrip("/").split("/")[-1] or type(model).__name__
        self.model = model.eval()
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(path, self.name)
        self.batch_size = batch_size
        self.append_eos = append_eos if append_eos is not None else self.index is not None and self.index.append_eos
        self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.num_labels: int = getattr(config, "num_labels", 1)
        self._scale = scale_in_weights(self.index)
        self._check_tokenizer()
        # the head reads the last token that is not padding, so the config must name the padding token
        self._config.pad_token_id = self.tokenizer.pad_token_id
        plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
        takes_cache = "use_cache" in inspect.signature(plain.forward).parameters
        self._options = (
            {"use_cache": False} if takes_cache else {}
        )  # nothing is generated, so a cache would only take memory

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def positions(self) -> int | None:
        """Tokens that the model has positions for; None for no limit."""
        return num_positions(self._config)

    def token_ids(self, prompts: Sequence, completions: Sequence) -> list[list[int]]:
        """Token ids of each text, as the model reads them, without a limit on their number."""
        texts = [self.text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        plain = [isinstance(prompt, str) for prompt in prompts]
        return [self._tokens([text], of_text)["input_ids"][0] for text, of_text in zip(texts, plain, strict=True)]

    def logits(self, prompts: Sequence, completions: Sequence, max_length: int | None = None) -> Tensor:
        """
        Logits of each completion: (B, L), fp32, on the CPU.

        Args:
            prompts (`Sequence` of `str` or of chats): B prompts.
            completions (`Sequence` of `str` or of chats): B completions, in the prompt's form.
            max_length (`int`, *optional*): Of longer texts read only the last `max_length` tokens, as `RewardTrainer`
                does with `overlong="truncate"`.

        Raises:
            `ValueError`: if the model cannot read a text, or logits are not finite.
        """
        logits = self.unchecked_logits(prompts, completions, max_length)  # (B, L)
        check_finite(logits.T, self.name, [f"label {label}" for label in range(logits.shape[1])], completions)
        return logits

    def unchecked_logits(self, prompts: Sequence, completions: Sequence, max_length: int | None = None) -> Tensor:
        """Those of `logits`, which may not be finite. Within [`shared_beginnings`] they are read from trees."""
        if beginnings_are_shared() and self.reads_trees:
            rows = self._encoded_rows(list(zip(prompts, completions, strict=True)), 0, max_length)["input_ids"]
            parts = self._logits_of_trees(rows)  # pyright: ignore[reportArgumentType]
        else:
            parts = [self.forward(inputs) for inputs in self.batches(prompts, completions, None, max_length)]
        return torch.cat(parts) if parts else torch.empty(0, self.num_labels)

    @functools.cached_property
    def reads_trees(self) -> bool:
        """
        Whether one pass over a tree of tokens gives the logits that the model gives for each text by itself.

        It holds for causal models with a linear head on the last token that take positions and a mask for each pair
        of tokens. Random tokens are read both ways to find out: others, such as models that read later tokens too, or
        that pool in another way, do not agree.
        """
        if self._head is None or not has_whole_weights(self.model):
            return False
        generator = torch.Generator().manual_seed(0)
        # short, so that the comparison costs little, and with different ends on one beginning
        texts = torch.randint(0, self._config.vocab_size, (3, 12), generator=generator).tolist()
        texts = [[token for token in text if token != self.tokenizer.pad_token_id] for text in texts]
        closing = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        rows = [text[:stop] + closing for text in texts for stop in (2, 5, 8, len(text))]
        try:
            inputs = self.tokenizer.pad({"input_ids": rows}, padding=True, padding_side="right", return_tensors="pt")
            expected = self.forward(inputs.to(self.device))  # (N, L)
            found = torch.cat(self._logits_of_trees(rows))  # (N, L)
        except Exception as error:  # a model may refuse these inputs in any way, and is then read text by text
            logger.info(f"'{self.name}' does not read several beginnings of a text in one pass: {error}")
            return False
        spread = expected.std(0)  # (L,)
        tolerance = _AGREEMENT + _ROUNDING * torch.finfo(self._dtype).eps
        return bool(((found - expected).abs() <= tolerance * spread + 1e-6).all())

    def batches(
        self,
        prompts: Sequence,
        completions: Sequence,
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> Iterator[Any]:
        """
        The model's inputs, (b, T) each, on its device.

        Args:
            prompts, completions, max_length: As in `logits`.
            batch_size (`int`, *optional*): Texts in each batch. Default: that of the classifier.
        """
        size = batch_size or self.batch_size
        pairs = list(zip(prompts, completions, strict=True))
        for start in range(0, len(pairs), size):
            yield self._encoded(pairs[start : start + size], start, max_length).to(self.device)

    @torch.no_grad()
    def forward(self, inputs: Any) -> Tensor:
        """One forward pass on one of the `batches`: raw logits (b, L), fp32, on the CPU."""
        training = self.model.training  # the model may be in training, with scoring between two steps
        if training:
            self.model.eval()
        try:
            logits = self.model(**inputs, **self._options).logits.float().cpu()
        finally:
            if training:
                self.model.train()
        return self._unscaled(logits)

    def _unscaled(self, logits: Tensor) -> Tensor:
        if self._scale is None:
            return logits
        gain, bias = self._scale
        return (logits - bias) / gain

    def _logits_of_trees(self, rows: list[list[int]]) -> list[Tensor]:
        """Logits of texts, given by their tokens, in parts: (n, L) each."""
        return [self._forward_trees(trees) for trees in in_batches(token_trees(map(self._read_tokens, rows)))]

    def _read_tokens(self, row: list[int]) -> list[int]:
        # the head reads the last token that is not the padding token, which may be the EOS that closes the text
        stop = len(row)
        while stop > 1 and row[stop - 1] == self.tokenizer.pad_token_id:
            stop -= 1
        return row[:stop]

    def _forward_trees(self, trees: list[TokenTree]) -> Tensor:
        inputs = tree_inputs(trees, self.tokenizer.pad_token_id, self._dtype)  # pyright: ignore[reportArgumentType]
        kept: list[Tensor] = []
        hook = self._head.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            self.forward({name: values.to(self.device) for name, values in inputs.items()})
        finally:
            hook.remove()
        logits = self._unscaled(kept[-1].float().cpu())  # (b, nodes, L)
        return torch.cat([logits[row, tree.ends] for row, tree in enumerate(trees)])

    @property
    def _head(self) -> Any:
        """The layer that gives the labels of each token, if there is one."""
        model: Any = self.model
        plain: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
        return next((module for name, module in plain.named_children() if is_head(name)), None)

    @property
    def _dtype(self) -> torch.dtype:
        return next(weight.dtype for weight in self.model.parameters() if weight.is_floating_point())

    def text(self, prompt: str | list[dict], completion: str | list[dict]) -> str:
        """The text that the model reads: prompt and completion joined, or the whole chat by the chat template."""
        if isinstance(prompt, str):
            text: str = prompt + completion  # pyright: ignore[reportOperatorIssue]
            eos: Any = self.tokenizer.eos_token
            if self.index is not None and self.index.tokenizer_appends_eos:
                return text.removesuffix(eos)
            # TRL looks only at the completion, so an empty one gets an EOS even if its prompt ends with one
            return text + eos if self.append_eos and not completion.endswith(eos) else text  # pyright: ignore
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"The tokenizer of the reward model '{self.name}' must have a `chat_template`, since prompts are "
                "chats; got None. Set it, or pass another tokenizer in `reward_processing_classes`."
            )
        check_texts([prompt], f"the reward model '{self.name}'")
        return self.tokenizer.apply_chat_template(list(prompt) + list(completion), tokenize=False)  # pyright: ignore

    def _encoded(self, pairs: list[tuple], first: int, max_length: int | None) -> BatchEncoding:
        inputs = self._encoded_rows(pairs, first, max_length)
        # transformers would advise to pad in the tokenizer's call, but the rows are tokenised already
        self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        return self.tokenizer.pad(inputs, padding=True, padding_side="right", return_tensors="pt")

    def _encoded_rows(self, pairs: list[tuple], first: int, max_length: int | None) -> BatchEncoding:
        if not pairs:
            return BatchEncoding({"input_ids": []})
        inputs = self._tokens([self.text(*pair) for pair in pairs], isinstance(pairs[0][0], str))
        if max_length is not None:
            inputs = BatchEncoding({name: [row[-max_length:] for row in rows] for name, rows in inputs.items()})
        limit, vocab_size = LengthLimit(positions=self.positions), getattr(self._config, "vocab_size", None)
        for row, (pair, ids) in enumerate(zip(pairs, inputs["input_ids"], strict=True)):
            if not ids:
                raise ValueError(
                    f"Prompt and completion must have at least one token for the reward model '{self.name}', got none "
                    f"in row {first + row}: {pair!r}. Give it a prompt, or leave the row out."
                )
            self._check_fits(ids, first + row, limit, vocab_size)
        return inputs

    def _tokens(self, texts: list[str], of_texts: bool) -> BatchEncoding:
        # TRL adds special tokens to plain texts in training, but not in scoring
        return self.tokenizer(text=texts, add_special_tokens=self.append_eos and of_texts)

    def _check_fits(self, ids: list[int], row: int, limit: LengthLimit, vocab_size: int | None) -> None:
        if vocab_size is not None and max(ids) >= vocab_size:
            raise ValueError(
                f"The tokenizer of the reward model '{self.name}' must be the one that it was trained with: it "
                f"gave token {max(ids)}, and the model's vocabulary has {vocab_size}. Pass the model's own tokenizer "
                "in `reward_processing_classes`."
            )
        if not limit.allows(len(ids)):
            raise ValueError(
                f"Prompt and completion must fit the context of the reward model '{self.name}', {limit.tokens} "
                f"tokens; got {len(ids)} with its tokenizer in row {row}. Drop longer prompts, or shorten the "
                "completions."
            )

    def _check_tokenizer(self) -> None:
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"The tokenizer of the reward model '{self.name}' must have a padding or an EOS token, got "
                "neither. Set `tokenizer.pad_token` and pass the tokenizer in `reward_processing_classes`."
            )
        if self.append_eos and self.tokenizer.eos_token is None:
            raise ValueError(
                f"`append_eos` needs a tokenizer with an EOS token, and that of '{self.name}' has none. Set "
                "`tokenizer.eos_token` to the one of the training."
            )


def too_long_for(
    classifiers: Sequence[TextClassifier], prompts: Sequence, completions: Sequence, max_length: int | None = None
) -> list[int]:
    """
    Rows whose text has more tokens than `max_length`, or than one of the classifiers has positions for.

    Args:
        classifiers (`Sequence[TextClassifier]`): The classifiers that will read the texts.
        prompts, completions: As in [`TextClassifier.logits`].
        max_length (`int`, *optional*): The longest text, in tokens. Default: the classifiers set the limit.
    """
    rows: set[int] = set()
    for classifier in classifiers:
        limit = LengthLimit(max_length, classifier.positions)
        if limit.tokens is not None:
            lengths = map(len, classifier.token_ids(prompts, completions))
            rows.update(row for row, length in enumerate(lengths) if not limit.allows(length))
    return sorted(rows)


def without_overlong(
    classifiers: Sequence[TextClassifier], prompts: Sequence, completions: Sequence
) -> tuple[list, list]:
    """Prompts and completions that all classifiers have positions for; a warning reports the number of others."""
    rows = too_long_for(classifiers, prompts, completions)
    if rows:
        logger.warning(
            f"{len(rows)} of {len(prompts)} completions have more tokens, with their prompts, than the reward model "
            f"has positions for: {shown_rows(rows)}. They are left out of the normalisation."
        )
    left_out = set(rows)
    kept = [pair for row, pair in enumerate(zip(prompts, completions, strict=True)) if row not in left_out]
    return [prompt for prompt, _ in kept], [completion for _, completion in kept]


def check_finite(values: Tensor, name: str, rows: Sequence[str], completions: Sequence) -> None:
    """
    Refuse logits that are not finite, with an error that names the model, its row and the completion.

    Args:
        values (`torch.Tensor`): Logits (K, B).
        name (`str`): Name of the model.
        rows (`Sequence[str]`): Names of the K rows.
        completions (`Sequence`): B completions.

    Raises:
        `ValueError`: if a logit is NaN or infinite.
    """
    if values.isfinite().all():
        return
    row, column = (~values.isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f"'{name}' must give finite logits, got {values[row, column].item()} from {rows[row]} for completion "
        f"{column}, {completions[column]!r}. Its weights or its precision are broken; try it in float32."
    )
