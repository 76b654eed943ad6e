"""A sequence-classification model as a reward function."""

import warnings
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase


@final
class RewardModel:
    """
    A sequence-classification model as a reward function of TRL's protocol: its first logit, on prompt and completion.

    The text is tokenised anew with the reward model's own tokenizer, which need not be the policy's, as TRL's
    `RLOOTrainer._calculate_rewards` does it: prompt and completion joined (through the chat template, for chats), no
    special tokens added, padded on the right. Where the tokenizer has no padding token, its EOS is used, and the model
    is told.

    Args:
        model (`torch.nn.Module` or `str` or `Path`):
            The classifier, with a `config`; put in evaluation mode, since dropout would make the reward random. Or
            where to load one with `num_labels=1` from.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The model's tokenizer. Default: the one saved beside the model.
        device (`torch.device`, *optional*):
            Where to put a model that is loaded from a path. A model passed as an instance stays where it is.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts in one forward pass; changes memory, and results by rounding only.

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
    ):
        if isinstance(model, (str, Path)):
            model = _load_classifier(str(model)).to(device or "cpu")
        config: Any = getattr(model, "config", None)
        if config is None:
            raise TypeError(
                "A module in `reward_funcs` must be a sequence-classification model with a `config`, got "
                f"{type(model).__name__}. Wrap it in a function `f(prompts, completions, **kwargs)` that returns a "
                "list of numbers."
            )
        path = getattr(config, "_name_or_path", "")
        self.__name__ = path.rstrip("/").split("/")[-1] or type(model).__name__
        if getattr(config, "num_labels", 1) != 1:
            warnings.warn(
                f"The reward model '{self.__name__}' has {config.num_labels} labels; as in TRL, the first logit is "
                "the reward. Wrap the model in a function if another label is meant.",
                stacklevel=2,
            )
        self.model = model.eval()
        self.tokenizer = tokenizer if tokenizer is not None else _load_tokenizer(path, self.__name__)
        self.batch_size = batch_size
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"The tokenizer of the reward model '{self.__name__}' must have a padding or an EOS token, got "
                "neither. Set `tokenizer.pad_token` and pass the tokenizer in `reward_processing_classes`."
            )
        self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        # the head reads the last token that is not padding: it must know which that is
        self._config.pad_token_id = self.tokenizer.pad_token_id

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """Reward of each completion. `columns` are TRL's other arguments, which a classifier has no use for."""
        texts = [self.text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        rewards: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            rewards += self._forward(texts[start : start + self.batch_size])
        return rewards

    def text(self, prompt: str | list[dict], completion: str | list[dict]) -> str:
        """What the model reads: prompt and completion joined, or the whole chat through the chat template."""
        if isinstance(prompt, str):
            return prompt + completion  # pyright: ignore[reportOperatorIssue]
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"The tokenizer of the reward model '{self.__name__}' must have a `chat_template`, since prompts are "
                "chats; got None. Set it, or pass another tokenizer in `reward_processing_classes`."
            )
        return self.tokenizer.apply_chat_template(list(prompt) + list(completion), tokenize=False)  # pyright: ignore

    @torch.inference_mode()
    def _forward(self, texts: list[str]) -> list[float]:
        inputs = self.tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        self._check_fits(inputs["input_ids"])
        inputs = inputs.to(next(self.model.parameters()).device)
        return self.model(**inputs).logits[:, 0].float().tolist()  # (B, L) -> (B,)

    def _check_fits(self, input_ids: Any) -> None:
        vocab_size = getattr(self._config, "vocab_size", None)
        if vocab_size is not None and input_ids.numel() and int(input_ids.max()) >= vocab_size:
            raise ValueError(
                f"The tokenizer of the reward model '{self.__name__}' must be the one that it was trained with: it "
                f"gave token {int(input_ids.max())}, and the model's vocabulary has {vocab_size}. Pass the model's "
                "own tokenizer in `reward_processing_classes`."
            )
        context = getattr(self._config, "max_position_embeddings", None)
        if context is not None and input_ids.shape[1] > context:
            raise ValueError(
                f"Prompt and completion must fit the context of the reward model '{self.__name__}', {context} tokens; "
                f"got {input_ids.shape[1]} with its tokenizer. Drop longer prompts, or shorten the completions."
            )


def _load_classifier(path: str) -> nn.Module:
    model, info = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, output_loading_info=True)
    # a head that the checkpoint lacks is drawn at random, with a warning only: the reward would be noise
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"`reward_funcs` must name sequence-classification models, got '{path}', whose checkpoint lacks "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}: these would be drawn at random. Train a "
            "reward model on it first (TRL's `RewardTrainer`), or pass a model instance if random weights are meant."
        )
    return model


def _load_tokenizer(path: str, name: str) -> PreTrainedTokenizerBase:
    if not path:
        raise ValueError(
            f"`reward_processing_classes` must hold the tokenizer of the reward model '{name}', got None: the model "
            "was not loaded from a path, where one could be found. Pass its tokenizer."
        )
    return AutoTokenizer.from_pretrained(path)
