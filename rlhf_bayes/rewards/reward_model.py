"""A sequence-classification model as a reward function."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_bayes.notebook import Described
from rlhf_bayes.rewards.folding import write_index
from rlhf_bayes.rewards.index import RewardIndex
from rlhf_bayes.rewards.normalization import Normalization
from rlhf_bayes.rewards.text_classifier import TextClassifier, without_overlong


@final
class RewardModel(Described):
    """
    A sequence-classification model as a reward function of TRL's protocol: its first logit, on prompt and completion.

    The text is tokenised with the reward model's own tokenizer, as [`TextClassifier`] says. An index beside a model
    that is loaded from a path (see [`RewardIndex`]) is applied: its normalization, and whether EOS is appended.

    Args:
        model (`torch.nn.Module` or `str` or `Path`):
            The classifier, with a `config`. It is put in evaluation mode, since dropout would make the reward random.
            Or the path to load one with one label from: a whole model, or a PEFT adapter.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The model's tokenizer. Default: the one saved beside the model.
        device (`torch.device`, *optional*):
            Where to put a model that is loaded from a path. A model passed as an instance stays where it is.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts in one forward pass; changes memory, and results by rounding only.
        index ([`RewardIndex`], *optional*):
            How to read a model. Default: the index beside a path, or none.
        dtype (`torch.dtype` or `"auto"`, *optional*):
            Type of the weights of a model that is loaded from a path. Default: fp32, also for a checkpoint in half
            precision, which would give many completions the same reward; `"auto"` keeps the checkpoint's.

    Raises:
        `TypeError`: `model` has no `config`.
        `ValueError`: the checkpoint has no classification head, is an ensemble, or no tokenizer or padding token is
            found.
    """

    num_members = 1  # an ensemble of one, where members are asked for

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 64,
        index: RewardIndex | None = None,
        dtype: torch.dtype | str = torch.float32,
    ):
        is_path = isinstance(model, (str, Path))
        if index is None:
            index = (RewardIndex.load(model) if is_path else None) or RewardIndex()
        if index.kind != "single":
            raise ValueError(
                f"`model` must be a single reward model, got an ensemble of {index.num_members} members ({index.kind})"
                f"{f' in {model!s}' if is_path else ''}. Load it with `RewardEnsemble.from_pretrained` or "
                "`load_reward`."
            )
        self.classifier = TextClassifier(model, tokenizer, device, batch_size, 1, None, dtype, index)
        self.__name__ = self.classifier.name
        if self.classifier.num_labels != 1:
            warnings.warn(
                f"The reward model '{self.__name__}' has {self.classifier.num_labels} labels; as in TRL, the first "
                "logit is the reward. Wrap the model in a function if another label is meant.",
                stacklevel=2,
            )
        self.normalization = index.normalization

    def _facts(self) -> dict[str, Any]:
        return {
            "name": self.__name__,
            "model": type(self.model).__name__,
            "normalized": self.normalization is not None,
        }

    @property
    def model(self) -> nn.Module:
        """The classifier."""
        return self.classifier.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The classifier's tokenizer."""
        return self.classifier.tokenizer

    @property
    def classifiers(self) -> list[TextClassifier]:
        """The classifiers that read the texts: here one, of an ensemble perhaps several."""
        return [self.classifier]

    @property
    def takes_prefixes(self) -> bool:
        """
        Whether a trainer asks it for the rewards of prefixes by default: it does if they take one pass.

        See [`TextClassifier.reads_trees`], and [`takes_prefixes`] for what they are good for.
        """
        return self.classifier.reads_trees

    @property
    def index(self) -> RewardIndex:
        """How the model is read, as `save_pretrained` stores it."""
        classifier = self.classifier
        by_tokenizer = classifier.index is not None and classifier.index.tokenizer_appends_eos
        return RewardIndex(
            "single",
            append_eos=classifier.append_eos,
            normalization=self.normalization,
            tokenizer_appends_eos=by_tokenizer,
        )

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """Reward of each completion. `columns` are TRL's other arguments, which a classifier does not use."""
        return self.rewards(prompts, completions).tolist()

    def rewards(self, prompts: Sequence, completions: Sequence) -> Tensor:
        """Reward of each completion, normalised: (B,), fp32, on the CPU."""
        return self.member_rewards(prompts, completions)[0]

    def member_rewards(self, prompts: Sequence, completions: Sequence) -> Tensor:
        """Reward of each completion, normalised: (1, B), fp32, on the CPU."""
        raw = self.classifier.logits(prompts, completions)[:, :1].T  # (1, B)
        return raw if self.normalization is None else self.normalization.apply(raw)

    def normalize(self, prompts: list, completions: list, reference: str = "reference completions") -> None:
        """
        Fit and keep gain and bias, so that the reward has mean 0 and standard deviation 1 on these completions.

        Completions that the model has no positions for are left out, and counted in a warning.

        Raises:
            `ValueError`: fewer than two completions, or a reward that does not vary.
        """
        prompts, completions = without_overlong([self.classifier], prompts, completions)
        self.normalization = Normalization.fit(self.classifier.logits(prompts, completions)[:, :1].T, reference)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, tokenizer and index; gain and bias into the weights where they can be, by [`write_index`]."""
        model: Any = self.model
        model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))
        write_index(folder, self.index, before=self.classifier.index)

    def text(self, prompt: str | list[dict], completion: str | list[dict]) -> str:
        """The text that the model reads: see [`TextClassifier.text`]."""
        return self.classifier.text(prompt, completion)
