"""Contact with TRL's model loading: loads a policy from a path with all of its weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate.utils import DistributedType
from transformers import AutoConfig, AutoProcessor
from trl import RLOOConfig
from trl.trainer.utils import create_model_from_path

from rlhf_bayes.lm.adapters import plainly_initialised
from rlhf_bayes.lm.pretrained import (
    check_decoder_only,
    check_whole,
    is_adapter,
    load_causal_lm,
    tokenizer_folder,
)


def loaded_policy(path: str, args: RLOOConfig, quantization_config: Any = None) -> Any:
    """
    The policy in a folder or a repository of the hub, loaded as `RLOOTrainer` loads it.

    A folder with an adapter gives its base with the adapter, which is trainable.

    Args:
        path (`str`):
            The folder or name of a model or an adapter.
        args ([`~trl.RLOOConfig`]):
            The configuration, whose `model_init_kwargs` and `trust_remote_code` are used.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            As in [`~trl.RLOOTrainer`].

    Raises:
        ValueError: if the checkpoint is not a causal LM, or lacks weights.
    """
    init_kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in init_kwargs:
            raise ValueError(
                "`quantization_config` must be given once, got it as an argument of the trainer and in "
                "`model_init_kwargs`. Leave it out of `model_init_kwargs`."
            )
        init_kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED):
        init_kwargs["device_map"] = None
    init_kwargs.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    if is_adapter(path):
        init_kwargs.setdefault("dtype", "float32")
        return load_causal_lm(path, is_trainable=True, **init_kwargs)
    named = {name: init_kwargs[name] for name in ("revision", "trust_remote_code") if name in init_kwargs}
    check_decoder_only(AutoConfig.from_pretrained(path, **named), path)
    model, info = create_model_from_path(path, output_loading_info=True, **init_kwargs)
    check_whole(path, info)
    return model


def _loaded_processor(path: str, args: RLOOConfig) -> Any:
    return AutoProcessor.from_pretrained(
        tokenizer_folder(path),
        revision=(args.model_init_kwargs or {}).get("revision"),
        truncation_side="left",
        padding_side="left",
        trust_remote_code=getattr(args, "trust_remote_code", False),
    )


@contextmanager
def policy_to_train(
    model: Any, args: RLOOConfig, trl_arguments: dict[str, Any], quantization_config: Any
) -> Iterator[tuple[Any, Callable[[], Any] | None]]:
    """
    A context that yields the policy as an instance, and a function that loads it again if it was given as a path.

    RLOO would draw weights that the checkpoint lacks at random. An adapter that RLOO creates from a configuration of
    the policy does not change the base.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The argument `model` of the trainer.
        args ([`~trl.RLOOConfig`]):
            The trainer's configuration. Within the context it has no `model_init_kwargs`, which are for a path.
        trl_arguments (`dict[str, Any]`):
            Further arguments of RLOO. The processor at the path (for an instance, where it has a vision tower), or
            `quantization_config`, is added to them.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantization of a model that is loaded from a path.
    """
    reload, init_kwargs = None, args.model_init_kwargs
    if isinstance(model, str):
        if trl_arguments.get("processing_class") is None:
            trl_arguments["processing_class"] = _loaded_processor(model, args)
        reload = partial(loaded_policy, model, args, quantization_config)
        model = reload()
    elif hasattr(model.config, "vision_config") and trl_arguments.get("processing_class") is None:
        trl_arguments["processing_class"] = _loaded_processor(model.config._name_or_path, args)
    if reload is None and quantization_config is not None:  # the oldest supported TRL has no such argument
        trl_arguments["quantization_config"] = quantization_config
    args.model_init_kwargs = None if reload is not None else init_kwargs
    try:
        with plainly_initialised(model):
            yield model, reload
    finally:
        args.model_init_kwargs = init_kwargs
