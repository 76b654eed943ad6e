"""The critic: the expected reward minus KL penalty after a prefix. It is a module of the policy, saved beside it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from rlhf_bayes.lm.trunk import trunk_of

CRITIC = "critic"  # the attribute of the causal LM that holds the critic, and its folder beside the policy's weights
FITTED = "fitted"  # the trunk of a critic that has none
_CONFIG, _HEAD = "critic_config.json", "value_head.safetensors"


def states_at(outputs: Any, places: Tensor) -> Tensor:
    """Last hidden states of a trunk at places (N,) among the R·W tokens of its rows: (N, H)."""
    return outputs.last_hidden_state.flatten(0, 1).index_select(0, places)


class Critic(nn.Module):
    """
    A value head on one of three trunks.

        u(prompt, x_<t) = w · h_t + b  ≈  E_π[r − β·log(π/π0)(x) | x_<t]

    The log-ratio is that of the whole completion, including the prefix, so u is the constant β·log Z where the policy
    is the posterior. The usual value, reward to go minus KL to go, is V(x_<t) = u + β·Σ_{i<t} log(π/π0)(x_i).

    Args:
        hidden_size (`int`):
            H of the trunk.
        backbone (`PreTrainedModel`, *optional*):
            A trunk of its own (no LM head). Default: the policy's own last hidden states.
        adapter (`str`, *optional*):
            Name of a PEFT adapter of the policy under which the policy's trunk is run a second time.
    """

    def __init__(self, hidden_size: int, backbone: PreTrainedModel | None = None, adapter: str | None = None):
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.value_head = nn.Linear(hidden_size, 1)
        # the output starts at 0, so that an untrained critic does not influence the policy
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.detach_trunk = False

    def forward(self, lm: PreTrainedModel, hidden: Tensor, places: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """
        Values of N prefixes: (N,), fp32, units of the reward.

        Args:
            lm (`PreTrainedModel`):
                The policy's causal LM, which holds the critic's adapter if it has one.
            hidden (`Tensor` (N, H)):
                The policy's last hidden state of each prefix.
            places (`Tensor` (N,)):
                Where the last token of each prefix stands among the R·W tokens that a trunk reads in R rows.
            inputs (`dict[str, Tensor]`):
                The inputs of the policy's trunk, for a critic with a trunk or an adapter of its own.
        """
        if self.backbone is not None:
            hidden = states_at(self.backbone(**inputs, use_cache=False), places)
        elif self.adapter is not None:
            with active_adapter(lm, self.adapter), _without_checkpointing(lm):
                hidden = states_at(trunk_of(lm)(**inputs, use_cache=False), places)
        if self.detach_trunk:
            hidden = hidden.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.value_head.weight.float(), self.value_head.bias.float()).squeeze(-1)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the value head, and the backbone if it has one, to a folder that [`Critic.from_pretrained`] reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        head = {name: tensor.contiguous().cpu() for name, tensor in state.items() if name.startswith("value_head.")}
        if self.backbone is not None:
            prefix = "backbone."
            backbone = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
            self.backbone.save_pretrained(folder, state_dict=backbone)
        save_file(head, folder / _HEAD)
        trunk = "backbone" if self.backbone is not None else "adapter" if self.adapter is not None else "shared"
        write_critic_config(folder, trunk, self.value_head.in_features, self.adapter)

    def load(self, folder: str | Path) -> None:
        """
        Load the value head, and the backbone if it has one, from a saved critic.

        Raises:
            ValueError: if the folder holds no critic, one without a head, or one for hidden states of another size.
        """
        config = critic_config(folder)
        if config["trunk"] == FITTED:
            raise ValueError(
                f"`folder` must hold a critic with a value head, got one in `{folder}` that was fitted in closed "
                "form. Read it by `FittedCritic.from_pretrained`."
            )
        size = config["hidden_size"]
        if size != self.value_head.in_features:
            raise ValueError(
                f"The critic in `{folder}` has hidden size {size}, the trunk it should read has "
                f"{self.value_head.in_features}: they must be equal. Start with a new critic, or use the policy that "
                "the critic was saved with."
            )
        state = load_file(Path(folder) / _HEAD)
        self.value_head.load_state_dict({name.removeprefix("value_head."): t for name, t in state.items()})
        if self.backbone is not None:
            self.backbone.load_state_dict(AutoModel.from_pretrained(folder, dtype=self.backbone.dtype).state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Critic":
        """
        Read a critic written by `save_pretrained`. Without a trunk of its own, it needs the policy it was saved with.

        Raises:
            ValueError: if the folder holds no critic.
        """
        config = critic_config(folder)
        backbone = AutoModel.from_pretrained(folder) if config["trunk"] == "backbone" else None
        critic = cls(config["hidden_size"], backbone, config["adapter"])
        critic.load(folder)
        return critic


def is_critic_folder(folder: str | Path) -> bool:
    """Whether the folder holds a saved critic, with a value head or fitted."""
    return (Path(folder) / _CONFIG).is_file()


def write_critic_config(folder: Path, trunk: str, hidden_size: int, adapter: str | None = None) -> None:
    """
    Write what [`critic_config`] reads.

    Args:
        folder (`Path`): The critic's folder.
        trunk (`str`): "shared", "backbone", "adapter" or "fitted".
        hidden_size (`int`): H of the hidden states that it reads.
        adapter (`str`, *optional*): The adapter under which the policy's trunk is run for it.
    """
    config = {"trunk": trunk, "hidden_size": hidden_size, "adapter": adapter}
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def critic_config(folder: str | Path) -> dict[str, Any]:
    """How to read a saved critic: its trunk ("shared", "backbone", "adapter" or "fitted"), hidden size, adapter."""
    if not is_critic_folder(folder):
        raise ValueError(f"`{folder}` must be a folder with a saved critic, but holds no {_CONFIG}.")
    return json.loads((Path(folder) / _CONFIG).read_text())


@contextmanager
def detached_critic(lm: PreTrainedModel) -> Iterator[Critic | None]:
    """A context in which the causal LM is without its critic, to save or send the policy alone; yields the critic."""
    critic = lm._modules.pop(CRITIC, None)
    try:
        yield critic
    finally:
        if critic is not None:
            lm._modules[CRITIC] = critic


def split_critic(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the state dict of a policy that holds a critic into those of the policy and of the critic."""
    policy, critic = {}, {}
    for name, tensor in state_dict.items():
        _, found, inner = f".{name}".partition(f".{CRITIC}.value_head.")
        _, in_backbone, inner_backbone = f".{name}".partition(f".{CRITIC}.backbone.")
        if found:
            critic[f"value_head.{inner}"] = tensor
        elif in_backbone:
            critic[f"backbone.{inner_backbone}"] = tensor
        else:
            policy[name] = tensor
    return policy, critic


def set_trainable(lm: PreTrainedModel, critic: Critic) -> None:
    """Make the critic trainable: its head, its backbone, and its adapter in the policy."""
    critic.requires_grad_(True)
    if critic.adapter is not None:
        for name, parameter in lm.named_parameters():
            if f".{critic.adapter}." in name:
                parameter.requires_grad_(True)


@contextmanager
def kept_trainable(model: nn.Module) -> Iterator[None]:
    """A context that restores each `requires_grad` at its end: PEFT freezes other adapters when it switches them."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


@contextmanager
def active_adapter(lm: PreTrainedModel, name: str) -> Iterator[None]:
    """A context in which one PEFT adapter of the causal LM is active, whichever is active or disabled outside."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # the second kind holds the modules named in `modules_to_save`
    layers = [module for module in lm.modules() if isinstance(module, kinds)]
    # not by `set_adapter`, which freezes the other adapters, whose gradients the same backward pass still needs
    active = [layer._active_adapter for layer in layers]
    disabled = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [name], False
    try:
        yield
    finally:
        for layer, names, off in zip(layers, active, disabled, strict=True):
            layer._active_adapter, layer._disable_adapters = names, off


@contextmanager
def _without_checkpointing(lm: PreTrainedModel) -> Iterator[None]:
    # the backward pass would recompute a checkpointed layer with the policy's adapter active
    modules = [module for module in trunk_of(lm).modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True
