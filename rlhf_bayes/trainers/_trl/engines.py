"""Contact with TRL's `models.utils`: what DeepSpeed and FSDP ask of the modules of a rollout trainer."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from rlhf_bayes.lm.critic import detached_critic
from rlhf_bayes.lm.forward import base_causal_lm


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed parts the weights too."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds all the weights."""
    return accelerator.distributed_type == DistributedType.FSDP or is_zero3(accelerator)


def plain(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A model without what an engine wraps around it."""
    # accelerate reads the metadata of packages each time that it unwraps, for milliseconds
    return module if isinstance(module, PreTrainedModel | PeftModel) else accelerator.unwrap_model(module)


def prepare_frozen(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A module that is not trained, spread as the engine spreads the others."""
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(module, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(module, accelerator)
    return accelerator.prepare_model(module, evaluation_mode=True)


def whole_heads(lms: list[nn.Module], accelerator: Accelerator) -> AbstractContextManager:
    """Within: the models' heads are whole, of which ZeRO-3 keeps a part in each process."""
    if not is_zero3(accelerator):
        return nullcontext()
    import deepspeed

    heads = (parameter for lm in lms for parameter in lm.get_output_embeddings().parameters())
    return deepspeed.zero.GatheredParameters(list(dict.fromkeys(heads)))


@contextmanager
def graph_kept(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Within: gradients, and checkpointing if it is asked for, where RLOO scores without either."""
    turned_on = args.gradient_checkpointing and not model.is_gradient_checkpointing
    if turned_on:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    with torch.enable_grad():
        yield
    if turned_on:
        model.gradient_checkpointing_disable()


def without_critic(sync_weights: Callable[[], None], policy: nn.Module) -> Callable[[], None]:
    """What sends weights to vLLM, without the value head: TRL sends every parameter, and vLLM has no place for it."""

    def sync_policy() -> None:
        with detached_critic(base_causal_lm(policy)):
            sync_weights()

    return sync_policy
