"""How PEFT adapters change the base that they are added to."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

# prefixes of `init_lora_weights` for which PEFT subtracts the new adapter's contribution from the base's own weights
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# those for which PEFT cannot repeat the subtraction when it reads the saved adapter: it depends on the random state (a
# randomised SVD), or on statistics of data (covariances, gradients) that are not saved
_NOT_REPEATABLE = ("pissa_niter", "corda", "lora_ga")


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers causal LM inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def initialisation(config: PeftConfig | None) -> str:
    """The name in `init_lora_weights` of an adapter's configuration, in lower case; empty if it is not a name."""
    value = getattr(config, "init_lora_weights", None)
    return value.lower() if isinstance(value, str) else ""


def rewrites_base(config: PeftConfig | None) -> bool:
    """Whether creating the adapter changes the base's own weights, so that the base differs from the loaded model."""
    return initialisation(config).startswith(_REWRITES_BASE)


def trains_biases(config: PeftConfig | None) -> bool:
    """Whether biases of the base are trained in place, which switching the adapter off does not undo."""
    return getattr(config, "bias", "none") != "none"


def is_prompt_learning(model: Any) -> bool:
    """Whether a model's active adapter is a prompt of virtual tokens before the text."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def described(model: nn.Module) -> str:
    """A description of a model: its class, and the kind of its adapter."""
    kind = getattr(model, "peft_type", None) if hasattr(model, "peft_config") else None
    name = type(base_causal_lm(model)).__name__
    return name if kind is None else f"{name} with a {getattr(kind, 'value', kind)} adapter"


def check_can_be_read_again(config: PeftConfig, name: str) -> None:
    """
    Refuse adapters that cannot be restored from their saved weights.

    Args:
        config (`PeftConfig`):
            Configuration of the adapter.
        name (`str`):
            Name of the adapter in the error.

    Raises:
        ValueError: if creating the adapter changes the base in a way that reading it cannot repeat.
    """
    if initialisation(config).startswith(_NOT_REPEATABLE):
        raise ValueError(
            f"`init_lora_weights` must be an initialisation that PEFT repeats when it reads a saved adapter, got "
            f"{config.init_lora_weights!r} for {name}: the base that it leaves depends on random numbers or on data "
            "that are not saved with it, so a reloaded policy would be another one. Take 'pissa' or 'olora' (exact), "
            "or True; convert a trained adapter by `save_pretrained(…, path_initial_model_for_weight_conversion=…)`."
        )


def check_leaves_base(config: Any, name: str) -> None:
    """
    Refuse adapters that share a base with others and change it when they are created.

    Args:
        config (`PeftConfig`):
            Configuration of one of the adapters.
        name (`str`):
            Name of the adapters in the error.

    Raises:
        ValueError: if the initialisation rewrites the base.
    """
    if rewrites_base(config):
        raise ValueError(
            f"`init_lora_weights` must leave the base as it is for {name}, which share one, got "
            f"{config.init_lora_weights!r}: each would change it under the others. Set `init_lora_weights=True`."
        )


def plain_copy(config: Any) -> Any:
    """A configuration for a second adapter on the same base: it starts from zero and does not change the base."""
    config = copy.deepcopy(config)
    for name, value in _PLAIN.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


@contextmanager
def plainly_initialised(model: Any) -> Iterator[None]:
    """
    A context in which a new adapter with a configuration of the model starts from zero and does not change the base.

    With `init_lora_weights="pissa"`, creating a second adapter would change the base of the first. The context keeps
    which parameters of the model are trainable.
    """
    configs: dict[str, Any] = model.peft_config if isinstance(model, PeftModel) else {}
    if not any(rewrites_base(config) or trains_biases(config) for config in configs.values()):
        yield
        return
    kept, trainable = dict(configs), {name: p.requires_grad for name, p in model.named_parameters()}
    configs.update({name: plain_copy(config) for name, config in kept.items()})
    try:
        yield
    finally:
        # the new adapters were created from the plain copies, and keep them
        configs.update(kept)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable.get(name, parameter.requires_grad))


_PLAIN = {"init_lora_weights": True, "bias": "none"}
