"""Contact with TRL's `models.utils`: how DeepSpeed and FSDP wrap and shard the modules of a rollout trainer."""

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
from rlhf_bayes.lm.forward import CompletionScores, base_causal_lm


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shards the weights."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds all the weights."""
    return accelerator.distributed_type == DistributedType.FSDP or is_zero3(accelerator)


def plain(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A model without the wrapper of an engine."""
    # unwrapping with accelerate takes milliseconds, since it reads the metadata of packages each time
    return module if isinstance(module, PreTrainedModel | PeftModel) else accelerator.unwrap_model(module)


def prepare_frozen(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Prepare a module that is not trained for the engine, which may shard it."""
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(module, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(module, accelerator)
    return accelerator.prepare_model(module, evaluation_mode=True)


@contextmanager
def in_full_precision(module: nn.Module) -> Iterator[None]:
    """A context in which a module's forward runs in the precision of its weights, without accelerate's autocast."""
    autocast, original = module.__dict__.get("forward"), getattr(module, "_original_forward", None)
    if original is None or autocast is None:
        yield
        return
    module.forward = original
    try:
        yield
    finally:
        module.forward = autocast


def reshard(model: nn.Module) -> None:
    """Part the weights that FSDP2 keeps whole after a forward, for a backward pass that does not come."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # of FSDPModule, whose place differs between torch's releases
            module.reshard()


def whole_heads(lms: list[nn.Module], accelerator: Accelerator) -> AbstractContextManager:
    """A context in which the heads of models are whole, though ZeRO-3 shards them."""
    if not is_zero3(accelerator):
        return nullcontext()
    import deepspeed

    heads = (parameter for lm in lms for parameter in lm.get_output_embeddings().parameters())
    return deepspeed.zero.GatheredParameters(list(dict.fromkeys(heads)))


def learns_from_earlier_forward(accelerator: Accelerator) -> bool:
    """
    Whether a step can go backward through a forward that was run before it, when the rollout was scored.

    Not under ZeRO-3: the heads are used outside of their models there, and are gathered for the scores alone
    ([`whole_heads`]), so that a later backward pass may find them released. FSDP1 and other engines were not tried.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return not is_zero3(accelerator)
    if kind == DistributedType.FSDP:
        return accelerator.is_fsdp2
    return kind == DistributedType.NO or kind.value.startswith("MULTI_")  # one process, or DDP


def as_returned_by(engine: nn.Module, scores: CompletionScores) -> CompletionScores:
    """
    Scores of an earlier forward of the plain model, as if its engine had just returned them.

    DDP looks at what its forward returns to see which gradients to wait for, and DeepSpeed puts hooks on it. Here they
    do that without running the model. They know nothing of the earlier forward until then, so that an error between,
    of a reward function for instance, leaves nothing begun. FSDP2 needs none of this: its hooks are on the modules,
    and have run in the earlier forward.

    Args:
        engine (`nn.Module`): What is trained: the model, in whatever wraps it.
        scores ([`~rlhf_bayes.lm.forward.CompletionScores`]): With gradient.
    """
    engine = getattr(engine, "_orig_mod", engine)  # where it is compiled
    return scores if isinstance(engine, PreTrainedModel | PeftModel) else engine(scores=scores)


@contextmanager
def graph_kept(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """A context with gradients and, if `args` ask for it, checkpointing, which RLOO turns off for scoring."""
    turned_on = args.gradient_checkpointing and not model.is_gradient_checkpointing
    if turned_on:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    with torch.enable_grad():
        yield
    if turned_on:
        model.gradient_checkpointing_disable()


def without_critic(sync_weights: Callable[[], None], policy: nn.Module) -> Callable[[], None]:
    """`sync_weights` without the critic: TRL sends every parameter to vLLM, which does not know the value head."""

    def sync_policy() -> None:
        with detached_critic(base_causal_lm(policy)):
            sync_weights()

    return sync_policy
