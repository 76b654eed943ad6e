"""The module that computes log π0: a frozen copy of the initial policy, or the policy without its adapters."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_bayes.lm import enable_completion_scoring
from rlhf_bayes.lm.adapters import base_causal_lm, described, initialisation, is_prompt_learning
from rlhf_bayes.lm.critic import active_adapter
from rlhf_bayes.lm.pretrained import check_decoder_only, load_causal_lm
from rlhf_bayes.trainers.rollout.prior_checks import prior_within

logger = logging.getLogger(__name__)


class Reference:
    """
    The source of log π0.

    Args:
        module (`nn.Module`, *optional*):
            A separate frozen model.
        adapter (`str`, *optional*):
            Without a module, the policy's adapter that holds the prior; None switches all adapters off.
    """

    def __init__(self, module: nn.Module | None, adapter: str | None = None):
        self.module, self.adapter = module, adapter

    @classmethod
    def of(
        cls,
        policy: nn.Module,
        ref_model: "str | PreTrainedModel | None",
        reload: Callable[[], Any] | None,
        passed: Tensor | None = None,
    ) -> "Reference":
        """
        The prior of a policy that has not been trained yet.

        Args:
            policy (`nn.Module`):
                The policy, PEFT-wrapped or not.
            ref_model (`str` or `PreTrainedModel`, *optional*):
                The prior, where it is not the policy itself.
            reload (`Callable`, *optional*):
                Loads the model as it was passed once more, if it was not passed as an instance.
            passed (`Tensor`, *optional*):
                What the model as passed computes, before the trainer put an adapter on it:
                [`~rlhf_bayes.trainers.rollout.prior_checks.probe_if_whole`].

        Raises:
            ValueError: if `ref_model` has another vocabulary, is the policy itself, or must be given because the
                policy's weights are sharded and cannot be copied, or its adapters changed the base.
        """
        if ref_model is not None:
            if isinstance(ref_model, str):
                ref_model = load_causal_lm(ref_model, dtype=policy.dtype)
            _check_ref_model(policy, ref_model)
        elif hasattr(policy, "peft_config"):
            # TRL keeps the initial state of a PeftModel's adapter as the adapter "ref"
            within = cls(None, "ref" if "ref" in policy.peft_config else None)
            ref_model = within._copied_where_needed(policy, reload, passed)
            if ref_model is None:
                return within
        elif any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
            if reload is None:
                raise ValueError(
                    "`ref_model` must be given under DeepSpeed ZeRO-3 when `model` is an instance: its weights are "
                    "sharded and cannot be copied. Pass `ref_model`, or `model` as a path."
                )
            ref_model = reload()
        else:
            ref_model = _copy(policy)
        ref_model.eval().requires_grad_(False)
        enable_completion_scoring(ref_model)
        return cls(ref_model)

    def _copied_where_needed(self, policy: Any, reload: Callable[[], Any] | None, passed: Tensor | None) -> Any:
        """The prior as a model of its own, where it is not within the policy for good; else None."""
        kind = prior_within(policy, self.active, passed)
        if kind == "switched":
            return None
        if kind == "copy":
            copied = _copy(policy)
        elif kind == "switched copy" and self.adapter is None and not is_prompt_learning(policy):
            copied = _copy(policy)
            copied.base_model.disable_adapter_layers()
        elif reload is not None:
            copied = reload()
        else:
            raise ValueError(
                f"`ref_model` must be given with {described(policy)} of this configuration "
                f"(`init_lora_weights`={initialisation(policy.active_peft_config)!r}, "
                f"`bias`={getattr(policy.active_peft_config, 'bias', 'none')!r}): making or training it changes the "
                "base, so the policy without its adapters is not the prior. Pass a copy of the model as `ref_model`, "
                "or an adapter with `init_lora_weights=True` and `bias='none'`."
            )
        logger.warning(
            "The policy without its adapters is not the prior, or does not stay it (%s): a frozen copy is kept as the "
            "reference, which takes the memory of a second model. `init_lora_weights=True` with `bias='none'` needs "
            "none.",
            described(policy),
        )
        return copied

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """A context in which the yielded module computes log π0. Run it without gradient."""
        with torch.no_grad():
            if self.module is not None:
                yield self.module
            elif self.adapter is not None:
                with active_adapter(base_causal_lm(policy), self.adapter):
                    yield policy
            else:
                with policy.disable_adapter():
                    yield policy


def _copy(model: Any) -> Any:
    # a patched forward is bound to the original model, so the copy gets that of its class
    lm = base_causal_lm(model)
    patches = {name: vars(lm).pop(name) for name in ("forward", "_scores_completions") if name in vars(lm)}
    try:
        return copy.deepcopy(model)
    finally:
        vars(lm).update(patches)


def _check_ref_model(policy: nn.Module, ref_model: PreTrainedModel) -> None:
    check_decoder_only(base_causal_lm(ref_model).config, "ref_model")
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
