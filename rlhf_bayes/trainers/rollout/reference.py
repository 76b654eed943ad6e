"""The module that holds the prior: a frozen copy of the policy as passed, or the policy with its adapters off."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_bayes.lm import enable_completion_scoring
from rlhf_bayes.lm.critic import active_adapter
from rlhf_bayes.lm.forward import base_causal_lm


class Reference:
    """
    Where log π0 comes from.

    Args:
        module (`nn.Module`, *optional*):
            A frozen model of its own.
        adapter (`str`, *optional*):
            Without a module: the policy's adapter that holds the prior; None switches all adapters off.
    """

    def __init__(self, module: nn.Module | None, adapter: str | None = None):
        self.module, self.adapter = module, adapter

    @classmethod
    def of(cls, policy: nn.Module, ref_model: "str | PreTrainedModel | None", loaded_from: str | None) -> "Reference":
        """
        The prior of a policy that has not been trained yet.

        Args:
            policy (`nn.Module`):
                The policy, PEFT-wrapped or not.
            ref_model (`str` or `PreTrainedModel`, *optional*):
                The prior, where it is not the policy itself.
            loaded_from (`str`, *optional*):
                Where the policy's weights came from, if it was not passed as an instance.

        Raises:
            ValueError: if `ref_model` has another vocabulary, is the policy itself, or cannot be copied because its
                weights are sharded.
        """
        if ref_model is not None:
            if isinstance(ref_model, str):
                ref_model = AutoModelForCausalLM.from_pretrained(ref_model, dtype=policy.dtype)
            _check_ref_model(policy, ref_model)
        elif hasattr(policy, "peft_config"):
            # TRL keeps the initial state of an adapter passed ready-made as "ref"
            return cls(None, "ref" if "ref" in policy.peft_config else None)
        elif any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
            if loaded_from is None:
                raise ValueError(
                    "`ref_model` must be given under DeepSpeed ZeRO-3 when `model` is an instance: its weights are "
                    "sharded and cannot be copied. Pass `ref_model`, or `model` as a path."
                )
            ref_model = AutoModelForCausalLM.from_pretrained(loaded_from, dtype=policy.dtype)
        else:
            ref_model = _copy(policy)
        ref_model.eval().requires_grad_(False)
        enable_completion_scoring(ref_model)
        return cls(ref_model)

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Within: the module to score with. Run without gradient."""
        with torch.no_grad():
            if self.module is not None:
                yield self.module
            elif self.adapter is not None:
                with active_adapter(base_causal_lm(policy), self.adapter):
                    yield policy
            else:
                with policy.disable_adapter():
                    yield policy


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    # a patched forward is bound to the original: the copy gets its class's own
    patches = {name: vars(model).pop(name) for name in ("forward", "_scores_completions") if name in vars(model)}
    try:
        return copy.deepcopy(model)
    finally:
        vars(model).update(patches)


def _check_ref_model(policy: nn.Module, ref_model: PreTrainedModel) -> None:
    if ref_model is policy or ref_model is base_causal_lm(policy):
        raise ValueError(
            "`ref_model` must not be the `model` object itself: the prior would move with the policy and the KL stay "
            "0. Leave `ref_model` out, and a frozen copy is made."
        )
    sizes = [model.config.get_text_config().vocab_size for model in (base_causal_lm(policy), ref_model)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`ref_model` must share the policy's vocabulary of {sizes[0]} tokens, got {sizes[1]}: KL compares the "
            "two token by token. Pass a model with the same tokenizer."
        )
