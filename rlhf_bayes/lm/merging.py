"""Merges adapters into their base, which keeps the distribution, or raises an error."""

from typing import Any

from peft import PeftModel
from torch import nn

from rlhf_bayes.lm.adapters import described


def merged(model: PeftModel) -> Any:
    """
    The base with its adapter added to its own weights. The given model must not be used afterwards.

    If the output head is tied to the input embeddings and the adapter changes one of them, they are untied first,
    since otherwise both would change.

    Raises:
        ValueError: if the adapter cannot be added to weights, for instance a prompt of virtual tokens.
    """
    if model.active_peft_config.is_prompt_learning or not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"An adapter must change weights to be merged, and {described(model)} does not (virtual tokens before the "
            "prompt, or modules of its own). Keep the folder as it is: `LanguageModel`, the trainers and PEFT read it."
        )
    _untie(model.get_base_model())
    return model.merge_and_unload()


def _untie(base: Any) -> None:
    config = base.config.get_text_config()
    outputs = base.get_output_embeddings()
    if not config.tie_word_embeddings or outputs is None:
        return
    inputs = base.get_input_embeddings()
    if not any(_is_adapted(module) for module in (inputs, outputs)):
        return
    head = outputs.get_base_layer() if hasattr(outputs, "get_base_layer") else outputs
    head = getattr(head, "original_module", head)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config.tie_word_embeddings = base.config.tie_word_embeddings = False


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") or hasattr(module, "original_module")
