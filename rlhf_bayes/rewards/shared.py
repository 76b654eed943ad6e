"""Reward models that are LoRA adapters on a policy's base, which scores them without a second copy in memory."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, final

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, load_peft_weights
from peft import set_peft_model_state_dict as load_adapter_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from rlhf_bayes.lm.adapters import base_causal_lm, rewrites_base, trains_biases
from rlhf_bayes.lm.critic import active_adapter
from rlhf_bayes.lm.pretrained import is_adapter
from rlhf_bayes.lm.probe import evaluating
from rlhf_bayes.lm.trunk import trunk_of
from rlhf_bayes.rewards.index import RewardIndex
from rlhf_bayes.rewards.loading import DEFAULT_ADAPTER, adapter_folders, is_head

_PREFIX = "rlhf_bayes_reward"  # prefix of the adapters' names in the policy
# options whose weights PEFT keeps outside of a layer's matrices, or for only one adapter at a time
_NOT_SHARED = ("trainable_token_indices", "target_parameters", "layer_replication", "megatron_config", "kasa_config")


class CannotShareError(ValueError):
    """Adapters cannot share the policy's base; the message says why."""


def is_on_base(folder: str | Path, index: RewardIndex, base: str, revision: str | None = None) -> bool:
    """
    Whether a folder holds LoRA adapters, each with a head and nothing else of its own, of the base with this name.

    Args:
        folder (`str` or `Path`): Folder of a reward model or an ensemble.
        index ([`RewardIndex`]): Its index.
        base (`str`): Folder or name that the base was loaded from.
        revision (`str`, *optional*): Revision of a repository of the hub.
    """
    if index.kind == "models":
        return False
    places = _places(folder, index)
    if not all(map(is_adapter, places)):
        return False
    configs = [PeftConfig.from_pretrained(str(place)) for place in places]
    return all(
        isinstance(config, LoraConfig)
        and config.peft_type == PeftType.LORA
        and not trains_biases(config)
        and not rewrites_base(config)
        and all(map(is_head, config.modules_to_save or ()))
        and not any(getattr(config, name, None) for name in _NOT_SHARED)
        and _same_place(config.base_model_name_or_path, base)
        and (Path(base).is_dir() or (config.revision or "main") == (revision or "main"))
        for config in configs
    )


def holds_weights_of(policy: nn.Module, base: str) -> bool:
    """
    Whether the policy's trunk, without its adapters, has the same weights as a folder or repository, tensor by tensor.

    Quantised weights cannot be compared and are believed to be the same. Weights that are sharded, or that have other
    names than those on disk, cannot be compared either and are held to be different.
    """
    lm = base_causal_lm(policy)
    own = {}
    for name, parameter in trunk_of(lm).named_parameters():
        if hasattr(parameter, "ds_id") or parameter.is_meta:
            return False
        if parameter.is_floating_point() and "lora_" not in name and ".modules_to_save." not in name:
            own[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = parameter
    prefix = f"{lm.base_model_prefix}."
    for file in _weight_files(base):
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                parameter = own.pop(key.removeprefix(prefix), None)
                if parameter is not None and not torch.equal(stored.get_tensor(key).to(parameter), parameter):
                    return False
    return not own


@contextmanager
def detached_rewards(policy: nn.Module) -> Iterator[tuple[str, ...]]:
    """A context in which the policy is without the adapters of reward models, to be saved; yields their names."""
    configs: Any = getattr(policy, "peft_config", {})
    names = [name for name in configs if name.startswith(_PREFIX)]
    kept = {name: configs.pop(name) for name in names}
    layers = [layer for layer in policy.modules() if isinstance(layer, BaseTunerLayer)] if names else []
    parts = [getattr(layer, part) for layer in layers for part in layer.adapter_layer_names]
    taken = [(part, {name: part.pop(name) for name in names if name in part}) for part in parts]
    try:
        yield tuple(names)
    finally:
        for part, of_names in taken:
            part.update(of_names)
        configs.update(kept)


@final
class SharedClassifier(nn.Module):
    """
    Adapters of a reward model as a sequence classifier whose trunk is the policy's.

    The adapters are frozen in the policy, which [`detached_rewards`] saves without them. The classifier and its heads
    are not part of the policy.

    Args:
        folder (`str` or `Path`):
            Folder in which the adapters were saved.
        index ([`RewardIndex`]):
            The index, which names the adapters.
        policy (`Callable[[], nn.Module]`):
            Returns the policy, a `PeftModel` prepared by [`~rlhf_bayes.lm.enable_completion_scoring`]. It is called at
            each scoring, since an engine may wrap the policy later.
        number (`int`):
            Number of this classifier among those in the policy.

    Attributes:
        peft_config (`dict[str, LoraConfig]`): by name, in the order of the index.

    Raises:
        [`CannotShareError`]: if the policy cannot take the adapters, which leaves it unchanged.
    """

    def __init__(self, folder: str | Path, index: RewardIndex, policy: Callable[[], nn.Module], number: int):
        super().__init__()
        places, wrapped = _places(folder, index), policy()
        if not isinstance(wrapped, PeftModel) or wrapped.peft_type != PeftType.LORA:
            raise CannotShareError(f"the policy is a {type(wrapped).__name__} without LoRA adapters")
        self.peft_config = {
            f"{_PREFIX}{number}_{member}": _frozen_config(place) for member, place in enumerate(places)
        }
        weights = [load_peft_weights(str(place), device="cpu") for place in places]
        heads = [{_without_wrapper(key): w for key, w in part.items() if is_head(key)} for part in weights]
        lm: Any = base_causal_lm(wrapped)
        self.classifier = _headless(places[0], lm, policy, heads[0])
        self.config = self.classifier.config
        self._put_heads(heads, lm)
        added = []
        try:
            for (adapter, config), part in zip(self.peft_config.items(), weights, strict=True):
                added.append(adapter)
                _add(wrapped, adapter, config, {key: w for key, w in part.items() if not is_head(key)})
        except CannotShareError:
            for adapter in added:
                wrapped.delete_adapter(adapter)
            raise

    def get_base_model(self) -> nn.Module:
        """The classifier without its adapters. The name is PEFT's."""
        return self.classifier

    def forward(self, **inputs: Any) -> Any:
        """The classifier's output, with the adapter that is active."""
        (first, *others) = self.peft_config
        with nullcontext() if others else active_adapter(self.classifier, first):
            return self.classifier(**inputs)

    def _put_heads(self, heads: list[dict[str, Tensor]], lm: Any) -> None:
        name = next(iter(heads[0])).partition(".")[0]
        head = getattr(self.classifier, name).to_empty(device=lm.device).to(lm.dtype).requires_grad_(False)
        adapters = list(self.peft_config)
        wrapper = ModulesToSaveWrapper(head, adapters[0])
        for adapter, weights in zip(adapters, heads, strict=True):
            wrapper.update(adapter)
            own = {key.partition(".")[2]: weight for key, weight in weights.items()}
            wrapper.modules_to_save[adapter].load_state_dict(own)
        setattr(self.classifier, name, wrapper.requires_grad_(False))


class _PolicyTrunk(nn.Module):
    """The policy's trunk in the place of a classifier's own. The policy's forward runs it, since engines hook that."""

    def __init__(self, trunk: nn.Module, policy: Callable[[], nn.Module]):
        super().__init__()
        self.trunk, self._policy = trunk, policy

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        with evaluating(self.trunk):
            return self._policy()(input_ids=input_ids, **inputs, trunk_only=True)


def _headless(place: Path, lm: Any, policy: Callable[[], nn.Module], head: dict[str, Tensor]) -> Any:
    # a separate config, since the classifier's padding token may differ from the policy's
    config = AutoConfig.from_pretrained(str(PeftConfig.from_pretrained(str(place)).base_model_name_or_path))
    config.num_labels = head[max(key for key in head if key.endswith("weight"))].shape[0]
    with torch.device("meta"):
        classifier: Any = AutoModelForSequenceClassification.from_config(config)
    trunk = getattr(classifier, classifier.base_model_prefix, None)
    if type(trunk) is not type(trunk_of(lm)):
        raise CannotShareError(f"a classifier of its family has another trunk than {type(lm).__name__}")
    setattr(classifier, classifier.base_model_prefix, _PolicyTrunk(trunk_of(lm), policy))
    left = {name for name, parameter in classifier.named_parameters() if parameter.is_meta}
    if left != set(head):
        raise CannotShareError(f"its head has {', '.join(sorted(head))}, and the classifier needs {', '.join(left)}")
    return classifier


def _frozen_config(place: Path) -> LoraConfig:
    config: Any = copy.deepcopy(PeftConfig.from_pretrained(str(place)))
    config.inference_mode, config.lora_dropout, config.modules_to_save = True, 0.0, None
    config.task_type = "CAUSAL_LM"
    return config


def _add(policy: PeftModel, adapter: str, config: LoraConfig, weights: dict[str, Tensor]) -> None:
    # adding an adapter changes the random state and freezes all other parameters; both are restored
    trainable = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    try:
        with torch.random.fork_rng(devices=[]):
            policy.add_adapter(adapter, config)
        slots = get_peft_model_state_dict(policy, adapter_name=adapter, save_embedding_layers=False)
        if slots.keys() != weights.keys():
            differing = sorted(slots.keys() ^ weights.keys())
            raise CannotShareError(f"the policy's layers and the adapter's differ in {differing[0]}")
        load_adapter_weights(policy, weights, adapter_name=adapter)
    finally:
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(trainable.get(name, False))


def _places(folder: str | Path, index: RewardIndex) -> list[Path]:
    return adapter_folders(folder, index.members if index.kind == "lora" else [DEFAULT_ADAPTER])


def _without_wrapper(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _same_place(one: str | None, other: str) -> bool:
    if one is None or not (Path(one).is_dir() and Path(other).is_dir()):
        return one == other
    return Path(one).resolve() == Path(other).resolve()


def _weight_files(base: str) -> list[Path]:
    folder = Path(base)
    if not folder.is_dir():
        folder = Path(cached_file(base, CONFIG_NAME) or "").parent
    return sorted(folder.glob("*.safetensors"))
