"""A classifier as evidence: the probability of a label."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_bayes.notebook import Described
from rlhf_bayes.rewards import TextClassifier


@final
class ClassifierLikelihood(Described):
    r"""
    Evidence of a sequence classifier, without a temperature:

        log_likelihood(c, x)  =  log p(O = label | c, x)

    The posterior π0(x | c) p(O = label | c, x) / Z(c) is what the prior writes, given that a reader would answer
    `label`; Z(c) = p(O = label | c) is how often the prior meets it. With one logit, p is σ(logit) for label 1 and
    σ(−logit) for label 0; with L of them, a softmax, or a sigmoid for each label where the model's `problem_type` is
    `"multi_label_classification"`.

    Args:
        model (`torch.nn.Module` or `str` or `Path`):
            The classifier, with a `config`, or the path to load it from. Its probabilities are used as they are:
            [`~rlhf_bayes.numerics.reliability_bins`] shows whether they are calibrated.
        label (`int` or `str`):
            The observed label: the index of a logit, or a name in `model.config.label2id`; 0 or 1 with one logit.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The model's tokenizer. Default: the one saved beside the model.
        device (`torch.device`, *optional*):
            Where to put a model that is loaded from a path.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts in one forward pass.

    Attributes:
        bound (`float`): 0 nats; no completion is more than certain. A draw from the prior that is kept with
            probability exp(log_likelihood) is an exact draw from the posterior.
        forbids (`bool`): False; no completion is impossible for a classifier with finite logits.

    Raises:
        `TypeError` or `ValueError`: if the model is no classifier, a regression or a reward model of `RewardTrainer`,
            or does not have the label.

    Source: Korbak, Perez & Buckley 2022, arXiv 2205.11275, equation 8.
    """

    bound: float | None = 0.0
    forbids: bool | None = False

    def __init__(
        self,
        model: nn.Module | str | Path,
        label: int | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 64,
    ):
        self.classifier = TextClassifier(model, tokenizer, device, batch_size)
        if self.classifier.index is not None:
            # comparisons do not fix a constant for each prompt, so σ of a reward is not a probability
            raise ValueError(
                f"`model` must give probabilities, and '{self.classifier.name}' is a reward model, learnt from "
                "comparisons. Use it as a reward: `RewardLikelihood(model, beta)`."
            )
        config: Any = self.classifier.model.config
        problem_type = getattr(config, "problem_type", None)
        if problem_type == "regression":
            raise ValueError(
                f"`model` must give probabilities, and the `problem_type` of '{self.classifier.name}' is "
                "'regression'. Use it as a reward: `RewardLikelihood(model, beta)`."
            )
        self._each_label = problem_type == "multi_label_classification" and self.classifier.num_labels > 1
        self.label = _checked_label(label, self.classifier.num_labels, getattr(config, "label2id", None) or {})

    def _facts(self) -> dict[str, Any]:
        return {"classifier": self.classifier.name, "label": self.label}

    @property
    def takes_prefixes(self) -> bool:
        """Whether the classifier reads prefixes in one pass: see [`TextClassifier.reads_trees`]."""
        return self.classifier.reads_trees

    def log_likelihood(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        log p(O = label | c, x) of each completion: (B,), fp32, nats, at most 0.

        Arguments are those of [`Likelihood.log_likelihood`]. `completion_ids` and `columns` are not read: the
        classifier has its own tokenizer.

        Raises:
            `ValueError`: if the classifier cannot read a text, or its logits are not finite.
        """
        logits = self.classifier.logits(prompts, completions)  # (B, L)
        if logits.shape[-1] == 1:
            return F.logsigmoid(logits[:, 0] if self.label == 1 else -logits[:, 0])
        log_prob = F.logsigmoid(logits) if self._each_label else logits.log_softmax(-1)  # (B, L)
        return log_prob[:, self.label]


def _checked_label(label: int | str, num_labels: int, label2id: Mapping[str, int]) -> int:
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError(
            f"`label` must be an index or a name of a label, got {label!r} of type {type(label).__name__}. Pass 1 for "
            "the positive answer of a classifier with one logit."
        )
    # one logit stands for two labels
    num_answers = max(num_labels, 2)
    if isinstance(label, str):
        if label not in label2id or num_labels == 1:
            named = ", ".join(repr(name) for name in label2id) if num_labels > 1 else "none with one logit"
            raise ValueError(f"`label` must be a name in `config.label2id` ({named}) or an index, got {label!r}.")
        label = int(label2id[label])
    if not 0 <= label < num_answers:
        raise ValueError(
            f"`label` must be between 0 and {num_answers - 1} for a classifier with {num_labels} "
            f"{'logit' if num_labels == 1 else 'logits'}, got {label}."
        )
    return label
