"""A sequence classifier on prompts and completions: tokenised, batched and checked."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from rlhf_bayes.rewards.index import RewardIndex
from rlhf_bayes.rewards.loading import load_classifier, load_tokenizer


@final
class TextClassifier:
    """
    The logits of a sequence-classification model on prompt and completion.

    The text is tokenised anew with the model's own tokenizer, which need not be the policy's, as TRL's
    `RLOOTrainer._calculate_rewards` does it: prompt and completion joined (through the chat template, for chats), no
    special tokens added, padded on the right. Where the tokenizer has no padding token, its EOS is used, and the model
    is told.

    Args:
        model (`torch.nn.Module` or `str` or `Path`):
            The classifier, with a `config`; put in evaluation mode, since dropout would make the logits random. Or
            where to load one from: a whole model, or a PEFT adapter.
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

    Attributes:
        name (`str`): Name of the model, from its path or its class.
        num_labels (`int`): L.
        index ([`RewardIndex`] or None): The index found beside a model that was loaded from a path.

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
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        self.index, path = None, ""
        if isinstance(model, (str, Path)):
            path = str(model)
            self.index = RewardIndex.load(path)
            model = load_classifier(path, num_labels).to(device or "cpu")
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
        self._check_tokenizer()
        # the head reads the last token that is not padding: it must know which that is
        self._config.pad_token_id = self.tokenizer.pad_token_id
        plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
        takes_cache = "use_cache" in inspect.signature(plain.forward).parameters
        self._options = {"use_cache": False} if takes_cache else {}  # nothing is generated: a cache is only memory

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def logits(self, prompts: Sequence, completions: Sequence) -> Tensor:
        """
        Logits of each completion: (B, L), fp32, on the CPU.

        Args:
            prompts (`Sequence` of `str` or of chats): B prompts.
            completions (`Sequence` of `str` or of chats): B completions, in the prompt's form.

        Raises:
            `ValueError`: a text that the model cannot read, or logits that are not finite.
        """
        rows = [self.forward(inputs) for inputs in self.batches(prompts, completions)]
        logits = torch.cat(rows) if rows else torch.empty(0, self.num_labels)  # (B, L)
        check_finite(logits.T, self.name, [f"label {label}" for label in range(logits.shape[1])], completions)
        return logits

    def batches(self, prompts: Sequence, completions: Sequence, batch_size: int | None = None) -> Iterator[Any]:
        """The model's inputs, (b, T) each, on its device, for `batch_size` texts at a time."""
        size = batch_size or self.batch_size
        pairs = list(zip(prompts, completions, strict=True))
        for start in range(0, len(pairs), size):
            yield self._encoded(pairs[start : start + size], start).to(self.device)

    @torch.no_grad()
    def forward(self, inputs: Any) -> Tensor:
        """One forward pass on one of the `batches`: (b, L), fp32, on the CPU."""
        training = self.model.training  # a model may be scored between the steps of its training
        if training:
            self.model.eval()
        try:
            return self.model(**inputs, **self._options).logits.float().cpu()
        finally:
            if training:
                self.model.train()

    def text(self, prompt: str | list[dict], completion: str | list[dict]) -> str:
        """What the model reads: prompt and completion joined, or the whole chat through the chat template."""
        if isinstance(prompt, str):
            text: str = prompt + completion  # pyright: ignore[reportOperatorIssue]
            eos: Any = self.tokenizer.eos_token
            return text + eos if self.append_eos and not text.endswith(eos) else text
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"The tokenizer of the reward model '{self.name}' must have a `chat_template`, since prompts are "
                "chats; got None. Set it, or pass another tokenizer in `reward_processing_classes`."
            )
        return self.tokenizer.apply_chat_template(list(prompt) + list(completion), tokenize=False)  # pyright: ignore

    def _encoded(self, pairs: list[tuple], first: int) -> BatchEncoding:
        texts = [self.text(prompt, completion) for prompt, completion in pairs]
        # in training TRL adds special tokens to plain texts, and when scoring to none
        special = self.append_eos and isinstance(pairs[0][0], str)
        inputs = self.tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=special
        )
        empty = (inputs["attention_mask"].sum(-1) == 0).nonzero().flatten().tolist()  # pyright: ignore
        if empty:
            raise ValueError(
                f"Prompt and completion must have at least one token for the reward model '{self.name}', got none in "
                f"row {first + empty[0]}: {pairs[empty[0]]!r}. Give it a prompt, or leave the row out."
            )
        self._check_fits(inputs["input_ids"])
        return inputs

    def _check_fits(self, input_ids: Any) -> None:
        vocab_size = getattr(self._config, "vocab_size", None)
        if vocab_size is not None and input_ids.numel() and int(input_ids.max()) >= vocab_size:
            raise ValueError(
                f"The tokenizer of the reward model '{self.name}' must be the one that it was trained with: it "
                f"gave token {int(input_ids.max())}, and the model's vocabulary has {vocab_size}. Pass the model's "
                "own tokenizer in `reward_processing_classes`."
            )
        context = getattr(self._config, "max_position_embeddings", None)
        if context is not None and input_ids.shape[1] > context:
            raise ValueError(
                f"Prompt and completion must fit the context of the reward model '{self.name}', {context} tokens; "
                f"got {input_ids.shape[1]} with its tokenizer. Drop longer prompts, or shorten the completions."
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


def check_finite(values: Tensor, name: str, rows: Sequence[str], completions: Sequence) -> None:
    """
    Refuse logits (K, B) that are not finite, naming the model, its row and the completion.

    Raises:
        `ValueError`: NaN or an infinity.
    """
    if values.isfinite().all():
        return
    row, column = (~values.isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f"'{name}' must give finite logits, got {values[row, column].item()} from {rows[row]} for completion "
        f"{column}, {completions[column]!r}. Its weights or its precision are broken; try it in float32."
    )
