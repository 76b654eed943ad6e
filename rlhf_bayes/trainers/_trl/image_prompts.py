"""
Contact with `RLOOTrainer`: prompts with images, each of which is processed by itself.

RLOO passes images to its processor twice, as chats to generate from, and as one batch to score, whose pixels it cuts
into rows; of images that stand in a chat the second knows nothing. Here each prompt is processed once, and what comes
out is kept with its row: all that is drawn and scored later reads the same pixels.

`PRIVATE_NAMES` lists the names that this relies on; `tests/trainers/_trl/test_image_prompts.py` fails by name when a
TRL release moves one.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import RLOOTrainer
from trl.data_utils import prepare_multimodal_messages

from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.head import exclude_tokens
from rlhf_bayes.lm.model_inputs import RowInputs, collated, is_of_tokens
from rlhf_bayes.lm.probe import add_image_to_probe
from rlhf_bayes.lm.prompt_ids import check_texts
from rlhf_bayes.trainers._trl.rloo_repairs import RepairedRLOO
from rlhf_bayes.trainers.rollout.images import check_rows_are_text, images_of, row_inputs, with_images_in_chat
from rlhf_bayes.trainers.rollout.scored_rollout import prompt_key

PRIVATE_NAMES = {
    "_tokenize_prompts": ("prompts",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
}
PRIVATE_ATTRIBUTES = ("_logs", "_tokenizer", "generation_config", "generation_kwargs", "log_completions")


def _inputs_that_rloo_passes() -> list[str]:
    """Names of the inputs, besides token ids, that RLOO passes to a model."""
    names = inspect.signature(RLOOTrainer._get_per_token_logps_and_entropies).parameters
    return [name for name in names if name.startswith(("pixel", "image")) or name.endswith(("shapes", "type_ids"))]


class ImagePromptRLOO(RepairedRLOO):
    """`RLOOTrainer` with images in prompts. Not for direct use: see [`PPOTrainer`]."""

    model_inputs: list[RowInputs] | None = None
    """Inputs of the prompts of the current rollout besides their tokens; None with a tokenizer."""
    data_rows: Sequence[dict[str, Any]] = ()
    """The rows of the dataset that the current rollout is drawn for, as reward functions get them."""

    @property
    def reads_images(self) -> bool:
        """Whether prompts may have images."""
        return isinstance(self.processing_class, ProcessorMixin)

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, that of the processor where there is one."""
        return self._tokenizer

    def exclude_image_token(self, policy: nn.Module, ref_model: nn.Module | None) -> None:
        """Exclude the token that stands for images from completions, as drawn and as scored."""
        excluded = [_image_token(base_causal_lm(policy), self.processing_class)] if self.reads_images else []
        if excluded:
            self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = excluded
        for model in (policy, ref_model):
            if model is not None:  # an earlier trainer of the same model may have excluded others
                exclude_tokens(base_causal_lm(model), excluded)

    def _generate_and_score_completions(self, inputs):
        self.data_rows, self.model_inputs = inputs, None
        if not self.reads_images:
            check_rows_are_text(inputs, self.processing_class)
            return super()._generate_and_score_completions(inputs)
        rows = [with_images_in_chat(row, prepare_multimodal_messages) for row in inputs]
        output = super()._generate_and_score_completions(rows)
        if self.log_completions and getattr(self, "log_multimodal", False):
            self._logs["images"].extend(gather_object([images_of(row["prompt"]) for row in rows]))
        return output

    def _tokenize_prompts(self, prompts):
        if not self.reads_images:
            return super()._tokenize_prompts(prompts)
        allowed, found = _inputs_that_rloo_passes(), {}
        keys = [prompt_key(prompt) for prompt in prompts]
        for key, prompt in zip(keys, prompts, strict=True):
            if key not in found:
                ids, _, fields = super()._tokenize_prompts([prompt])
                found[key] = ids[0], row_inputs(fields, allowed, type(self.processing_class).__name__)
        ids, rows = [found[key][0] for key in keys], [found[key][1] for key in keys]
        self.model_inputs = rows
        lengths = [len(row) for row in ids]
        fields: dict[str, Any] = collated(rows, lengths, max(lengths), 0, "cpu")
        for name in filter(is_of_tokens, list(fields)):  # RLOO pads lists as it pads token ids
            fields[name] = [
                row[name].tolist() if name in row else [0] * n for row, n in zip(rows, lengths, strict=True)
            ]
        return ids, None, fields

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        for func in self.reward_funcs:
            if isinstance(func, nn.Module):
                check_texts(prompts, f"the reward model {type(func).__name__}")
        return super()._calculate_rewards(self.data_rows, prompts, completions, completion_ids_list)


def _image_token(lm: PreTrainedModel, processor: ProcessorMixin) -> int:
    token = getattr(lm.config, "image_token_id", None)
    token = getattr(processor, "image_token_id", None) if token is None else token
    if token is None:
        raise ValueError(
            f"`model` must say which token stands for images, got {type(lm).__name__} without `image_token_id` in its "
            "config: completions with that token could not be read. Set `model.config.image_token_id`."
        )
    return token


def probe_with_image(model: nn.Module, processing_class: Any) -> None:
    """
    Let the probe of a vision-language model, which tells whether two models are the same, read an image too.

    Args:
        model (`nn.Module`):
            The policy.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Its processor. Nothing is done without one that makes chats.
    """
    if not isinstance(processing_class, ProcessorMixin) or getattr(processing_class, "chat_template", None) is None:
        return
    from PIL import Image

    pixels = np.arange(64 * 64 * 3).reshape(64, 64, 3) * 7919 % 256
    image = Image.fromarray(pixels.astype(np.uint8))
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a"}]}]
    encoded = processing_class.apply_chat_template(
        [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    add_image_to_probe(model, encoded)
