"""How much memory the roles of PPO take, counted on a model without weights (torch's meta device)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rlhf_bayes.lm.head import chunk_rows
from rlhf_bayes.lm.trunk import trunk_of

FLOAT = 4  # bytes
# number of (rows, V) tensors in fp32 that exist at once: the log-softmax with its two gradients in training; with the
# reference's log-softmax and p in scoring
_CHUNKS = 3.0


@dataclass(frozen=True)
class Roles:
    """
    The roles of PPO that hold weights of their own.

    Args:
        lora_r (`int`, *optional*): Rank of the policy's adapter; None trains all weights.
        lora_target_modules (`str` or `list[str]`, *optional*): As in PEFT. Default: PEFT's for the model's family.
        critic (`str`): `"ridge"`, which has no weights in the policy, `"shared"` or `"separate"`.
        reward (`str`): `"function"`, `"adapter"` (on the policy's base) or `"model"`.
        reward_members (`int`): Number of adapters or models of an ensemble.
    """

    lora_r: int | None = None
    lora_target_modules: Any = None
    critic: str = "ridge"
    reward: str = "model"
    reward_members: int = 1

    def __post_init__(self):
        if self.lora_r is None and self.reward == "adapter":
            raise ValueError(
                "`reward` must be 'model' or 'function' without `lora_r`, got 'adapter': the policy moves its own "
                "base. Set `lora_r`."
            )


FOUR_MODELS = Roles(critic="separate", reward="model")


@dataclass(frozen=True)
class Run:
    """
    The shapes and the settings of a training run.

    Args:
        batch_size, prompt_length, completion_length (`int`): Size of a micro-batch: sequences, tokens, tokens.
        dtype (`torch.dtype`): Type of the weights that are loaded. Adapters are fp32.
        gradient_checkpointing (`bool`): Whether the backward pass runs the layers again.
        zero_stage, num_processes (`int`): DeepSpeed's ZeRO stage (0 without it), and the number of processes.
    """

    batch_size: int = 8
    prompt_length: int = 128
    completion_length: int = 128
    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False
    zero_stage: int = 0
    num_processes: int = 1


@dataclass
class Part:
    """Bytes of one role on one process."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0


@dataclass
class Footprint:
    """Bytes on one process: `roles` by name, and what each phase needs on top of weights and optimizer."""

    roles: dict[str, Part] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> float:
        """Bytes of the weights of all roles."""
        return sum(part.weights for part in self.roles.values())

    @property
    def peak(self) -> float:
        """Bytes in the phase that needs most. Activations are freed as gradients fill: the larger counts."""
        kept = sum(part.weights + part.optimizer for part in self.roles.values())
        gradients = sum(part.gradients for part in self.roles.values())
        return kept + max(gradients, *self.phases.values())


def footprint(config: PreTrainedConfig, roles: Roles, run: Run) -> Footprint:
    """
    Memory of PPO, without the libraries, fragmentation and buffers of the network.

    Args:
        config (`PreTrainedConfig`): Configuration of the causal LM.
        roles ([`Roles`]): The roles that hold weights of their own.
        run ([`Run`]): The shapes and the settings of the run.
    """
    policy = _model(config, roles, run)
    lm = policy.get_base_model() if roles.lora_r is not None else policy
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in policy.parameters()) - trained
    trunk = sum(p.numel() for name, p in trunk_of(lm).named_parameters() if "lora_" not in name)
    hidden = config.get_text_config().hidden_size
    size = run.dtype.itemsize
    whole = trained + frozen if roles.lora_r is None else frozen

    found = Footprint()
    found.roles["policy"] = _part(frozen, trained, FLOAT if roles.lora_r is not None else size, run)
    found.roles["reference"] = _part(0 if roles.lora_r is not None else whole, 0, size, run)
    if roles.critic == "ridge":
        critic = Part()
    elif roles.critic == "shared":
        critic = _part(0, hidden + 1, FLOAT, run)
    elif roles.lora_r is None:
        critic = _part(0, trunk + hidden + 1, size, run)
    else:
        critic = _part(0, trained + hidden + 1, FLOAT, run)
    found.roles["critic"] = critic
    members = roles.reward_members
    # assumed: a reward adapter has the policy's rank, and a reward model is whole on each process, under ZeRO-3 too
    if roles.reward == "adapter":
        found.roles["reward"] = Part(_part(0, members * (trained + hidden), FLOAT, run).weights)
    else:
        found.roles["reward"] = Part(float(members * (trunk + hidden) * size) if roles.reward == "model" else 0.0)
    found.phases = _phases(config, lm, roles, run)
    return found


def _model(config: PreTrainedConfig, roles: Roles, run: Run) -> Any:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=run.dtype)
        if roles.lora_r is not None:
            lora = LoraConfig(r=roles.lora_r, target_modules=roles.lora_target_modules, task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
    return model


def _part(frozen: int, trained: int, trained_size: int, run: Run) -> Part:
    shards = [run.num_processes if run.zero_stage >= stage else 1 for stage in (3, 2, 1)]
    # Adam has two moments; DeepSpeed keeps them in fp32, and a copy in fp32 of weights of lower precision
    master = run.zero_stage > 0 and trained_size < FLOAT
    optimizer = 3 * FLOAT if master else 2 * trained_size
    return Part(
        (frozen * run.dtype.itemsize + trained * trained_size) / shards[0],
        trained * trained_size / shards[1],
        trained * optimizer / shards[2],
    )


def _phases(config: PreTrainedConfig, lm: Any, roles: Roles, run: Run) -> dict[str, float]:
    text = config.get_text_config()
    length = run.prompt_length + run.completion_length
    rows = run.batch_size * run.completion_length
    scoring, training = (
        _CHUNKS * min(rows, chunk_rows(text.vocab_size, text.hidden_size, learns)) * text.vocab_size * FLOAT
        for learns in (False, roles.lora_r is None)
    )
    states = rows * text.hidden_size * FLOAT

    kept = saved_for_backward(lm, run.batch_size, length, run.gradient_checkpointing)
    layer = saved_for_backward(lm, run.batch_size, length, False) / text.num_hidden_layers
    if run.gradient_checkpointing:  # the backward pass runs one layer again at a time
        kept += layer
    # the pass of a critic's adapter is not checkpointed: it would be run again with the policy's adapter active
    if roles.critic == "separate":
        again = saved_for_backward(lm, run.batch_size, length, run.gradient_checkpointing and roles.lora_r is None)
        kept += again

    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * run.batch_size * length * heads * width * run.dtype.itemsize  # bytes of one layer's cache
    return {
        "generation": cache * (text.num_hidden_layers + 1.0),  # + 1: a layer's cache is copied when it grows
        "scoring": layer + 2 * states + scoring,
        "training": kept + 2 * states + training,
    }


def saved_for_backward(lm: nn.Module, batch_size: int, length: int, gradient_checkpointing: bool) -> float:
    """
    Bytes that a forward pass of the trunk of a causal LM on the meta device keeps for its backward pass.

    Args:
        lm (`torch.nn.Module`): The causal LM.
        batch_size, length (`int`): Sequences, and tokens of each.
        gradient_checkpointing (`bool`): Whether the backward pass runs the layers again.
    """
    model: Any = lm
    odd = length | 1  # the sizes of a model are even, so none of them is mistaken for the length
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # on the meta device attention keeps its (T, T) weights; the kernels of real devices do not
        if storage._cdata not in weights and tuple(tensor.shape[-2:]) != (odd, odd):
            kept[storage._cdata] = storage
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trunk_of(model)(
            inputs_embeds=torch.zeros(batch_size, odd, _width(model), dtype=model.dtype).requires_grad_(),
            # a full mask: transformers would read the entries of a padding mask, and meta tensors have none
            attention_mask=torch.ones(batch_size, 1, odd, odd, dtype=torch.bool),
            position_ids=torch.zeros(batch_size, odd, dtype=torch.long),
            use_cache=False,
        )
    if gradient_checkpointing:
        model.gradient_checkpointing_disable()
    return sum(storage.nbytes() for storage in kept.values()) * length / odd


def _width(model: Any) -> int:
    return model.get_input_embeddings().embedding_dim
