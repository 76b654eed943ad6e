"""The transformer under a causal LM's head."""

from typing import Any

from transformers import PreTrainedModel


def trunk_of(lm: PreTrainedModel) -> Any:
    """
    The module that gives last hidden states.

    `base_model` is looked up by `base_model_prefix`. Some families (Llama 4) name an attribute there that only their
    multimodal class has, and `base_model` is then the whole model.

    Raises:
        ValueError: if the model holds no transformer by a name that is known.
    """
    if lm.base_model is not lm:
        return lm.base_model
    if not hasattr(lm, "model"):
        raise ValueError(
            f"The model must hold its transformer as `{lm.base_model_prefix}` or `model`, got {type(lm).__name__}, "
            "which has neither. This model family is not supported yet; please report it with its config."
        )
    return lm.model
