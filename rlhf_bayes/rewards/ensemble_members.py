"""The members of a reward ensemble: heads on one trunk, adapters on one base, or models of their own."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, final

import torch
from peft import PeftType
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from rlhf_bayes.lm.critic import active_adapter
from rlhf_bayes.rewards.reward_model import RewardModel
from rlhf_bayes.rewards.text_classifier import TextClassifier, check_finite
from rlhf_bayes.rewards.token_trees import beginnings_are_shared

logger = logging.getLogger(__name__)


class Members(Protocol):
    """The protocol that an ensemble's members have."""

    kind: str
    """As in [`RewardIndex`]."""
    names: list[str]
    """K names, as in [`RewardIndex`]."""

    @property
    def append_eos(self) -> bool:
        """As in [`RewardIndex`]."""
        ...

    @property
    def classifiers(self) -> list[TextClassifier]:
        """The classifiers that read the texts: one that the members share, or one for each."""
        ...

    @property
    def read_trees(self) -> bool:
        """Whether all of them read prefixes of a text in one pass: see [`TextClassifier.reads_trees`]."""
        ...

    def raw_rewards(self, prompts: Sequence, completions: Sequence, members: Sequence[int]) -> Tensor:
        """Rewards of the chosen members before the ensemble's normalization: (len(members), B), fp32, on the CPU."""
        ...

    def logits(self, prompts: Sequence, completions: Sequence, max_length: int | None = None) -> Tensor:
        """The members' logits before any normalization, (K, B), fp32, on the CPU; see [`TextClassifier.logits`]."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write weights and tokenizers."""
        ...


@final
class Heads:
    """One classifier with K labels, each of them a member."""

    kind = "heads"

    def __init__(self, classifier: TextClassifier):
        self.classifier = classifier
        self.names = [f"head_{member}" for member in range(classifier.num_labels)]

    @property
    def append_eos(self) -> bool:
        return self.classifier.append_eos

    @property
    def classifiers(self) -> list[TextClassifier]:
        return [self.classifier]

    @property
    def read_trees(self) -> bool:
        return self.classifier.reads_trees

    def raw_rewards(self, prompts: Sequence, completions: Sequence, members: Sequence[int]) -> Tensor:
        return self._scored(prompts, completions, members)

    def logits(self, prompts: Sequence, completions: Sequence, max_length: int | None = None) -> Tensor:
        return self._scored(prompts, completions, range(len(self.names)), max_length)

    def _scored(
        self, prompts: Sequence, completions: Sequence, members: Sequence[int], max_length: int | None = None
    ) -> Tensor:
        rewards = self.classifier.unchecked_logits(prompts, completions, max_length).T[list(members)]  # (K, B)
        check_finite(rewards, self.classifier.name, _described(self.names, members), completions)
        return rewards

    def save(self, folder: str | Path) -> None:
        _save(self.classifier, folder)


@final
class Adapters:
    """
    One base under K PEFT adapters, each with its classification head.

    All members are scored in one forward pass, with rows of different adapters in one batch, if PEFT can do that;
    otherwise one after the other.
    """

    kind = "lora"

    def __init__(self, classifier: TextClassifier):
        if classifier.num_labels != 1:
            raise ValueError(
                f"Each adapter of an ensemble must have one label, got {classifier.num_labels} in "
                f"'{classifier.name}'. Load the base with `num_labels=1`, or make its labels the members: one adapter."
            )
        self.classifier = classifier
        self._model: Any = classifier.model
        self.names = list(self._model.peft_config)
        self.in_one_pass = all(config.peft_type == PeftType.LORA for config in self._model.peft_config.values())

    @property
    def append_eos(self) -> bool:
        return self.classifier.append_eos

    @property
    def classifiers(self) -> list[TextClassifier]:
        return [self.classifier]

    @property
    def read_trees(self) -> bool:
        with active_adapter(self._model.get_base_model(), self.names[0]):
            return self.classifier.reads_trees

    def raw_rewards(self, prompts: Sequence, completions: Sequence, members: Sequence[int]) -> Tensor:
        return self._rewards(prompts, completions, members)

    def logits(self, prompts: Sequence, completions: Sequence, max_length: int | None = None) -> Tensor:
        return self._rewards(prompts, completions, range(len(self.names)), max_length)

    def _rewards(
        self, prompts: Sequence, completions: Sequence, members: Sequence[int], max_length: int | None = None
    ) -> Tensor:
        adapters = [self.names[member] for member in members]
        if beginnings_are_shared():
            rewards = []
            for adapter in adapters:
                with active_adapter(self._model.get_base_model(), adapter):
                    rewards.append(self.classifier.unchecked_logits(prompts, completions, max_length)[:, 0])  # (B,)
            return self._checked(torch.stack(rewards), members, completions)
        # a text takes a row for each adapter, and memory limits the number of rows
        size = max(1, self.classifier.batch_size // len(adapters)) if self.in_one_pass else None
        batches = self.classifier.batches(prompts, completions, size, max_length)
        parts = [self._scored(inputs, adapters) for inputs in batches]
        rewards = torch.cat(parts, dim=1) if parts else torch.empty(len(members), 0)  # (K, B)
        return self._checked(rewards, members, completions)

    def _checked(self, rewards: Tensor, members: Sequence[int], completions: Sequence) -> Tensor:
        check_finite(rewards, self.classifier.name, _described(self.names, members), completions)
        return rewards

    def save(self, folder: str | Path) -> None:
        # PEFT writes the base's own path where a config has none
        base = self._model.get_base_model().name_or_path
        if not all(config.base_model_name_or_path or base for config in self._model.peft_config.values()):
            raise ValueError(
                "The base of the adapters must have been loaded from a path, which they name when they are loaded "
                "again; got a base that was built in memory. Save it with `save_pretrained`, load it from there, and "
                "put the adapters on that one."
            )
        _save(self.classifier, folder)

    def _scored(self, inputs: Any, adapters: list[str]) -> Tensor:
        if self.in_one_pass and len(adapters) > 1 and not self._is_partitioned():
            try:
                return self._together(inputs, adapters)
            except (NotImplementedError, TypeError, ValueError) as error:  # not every adapter or head can mix
                logger.info(f"The adapters of '{self.classifier.name}' are scored one after the other: {error}")
                self.in_one_pass = False
        return self._in_turn(inputs, adapters)

    def _is_partitioned(self) -> bool:
        # PEFT iterates over a set, whose order differs between processes, but ZeRO-3 needs the same order on all
        return any(hasattr(parameter, "ds_id") for parameter in self._model.parameters())

    def _together(self, inputs: Any, adapters: list[str]) -> Tensor:
        rows = len(inputs["input_ids"])
        repeated = {name: column.repeat(len(adapters), 1) for name, column in inputs.items()}  # (K·b, T)
        names = [adapter for adapter in adapters for _ in range(rows)]
        # a module without these adapters behaves like the base only while one of them is active
        base = self._model.get_base_model()
        with active_adapter(base, adapters[0]), _adapter_of_each_row(self._model, names):
            return self.classifier.forward(repeated)[:, 0].view(len(adapters), rows)

    def _in_turn(self, inputs: Any, adapters: list[str]) -> Tensor:
        rewards = []
        for adapter in adapters:
            with active_adapter(self._model.get_base_model(), adapter):
                rewards.append(self.classifier.forward(inputs)[:, 0])  # (b,)
        return torch.stack(rewards)


@final
class Models:
    """K reward models of their own, each with its tokenizer and, where it has one, its normalization."""

    kind = "models"

    def __init__(self, models: Sequence[RewardModel]):
        if not models:
            raise ValueError("`members` must hold at least one reward model, got an empty list. Pass some.")
        self.models = list(models)
        self.names = [f"member_{member}" for member in range(len(self.models))]

    @property
    def append_eos(self) -> bool:
        return all(model.classifier.append_eos for model in self.models)

    @property
    def classifiers(self) -> list[TextClassifier]:
        return [model.classifier for model in self.models]

    @property
    def read_trees(self) -> bool:
        return all(model.takes_prefixes for model in self.models)

    def raw_rewards(self, prompts: Sequence, completions: Sequence, members: Sequence[int]) -> Tensor:
        rewards = []
        for member, described in zip(members, _described(self.names, members), strict=True):
            try:
                rewards.append(self.models[member].rewards(prompts, completions))
            except Exception as error:
                error.add_note(f"Raised by {described} of the reward ensemble.")
                raise
        return torch.stack(rewards)  # (K, B)

    def logits(self, prompts: Sequence, completions: Sequence, max_length: int | None = None) -> Tensor:
        rewards = [model.classifier.logits(prompts, completions, max_length)[:, 0] for model in self.models]
        return torch.stack(rewards)  # (K, B)

    def save(self, folder: str | Path) -> None:
        for name, model in zip(self.names, self.models, strict=True):
            model.save_pretrained(Path(folder) / name)


@contextmanager
def _adapter_of_each_row(model: nn.Module, names: list[str]) -> Iterator[None]:
    # not by PEFT's argument `adapter_names`, which leaves hooks behind if a layer cannot mix adapters
    def with_names(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"adapter_names": names}

    layers = [module for module in model.modules() if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))]
    hooks: list[Any] = []
    try:
        for layer in layers:
            module: Any = layer
            hooks.append(module.register_forward_pre_hook(with_names, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _described(names: Sequence[str], members: Sequence[int]) -> list[str]:
    return [f"member {member} ({names[member]})" for member in members]


def _save(classifier: TextClassifier, folder: str | Path) -> None:
    model: Any = classifier.model
    model.save_pretrained(str(folder))
    classifier.tokenizer.save_pretrained(str(folder))
