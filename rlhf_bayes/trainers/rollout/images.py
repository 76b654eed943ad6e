"""Images in prompts: where they stand in a row of a dataset, and checks that models read them wherever they score."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, IterableDataset
from torch import Tensor, nn
from transformers import ProcessorMixin

from rlhf_bayes.lm.adapters import base_causal_lm, described
from rlhf_bayes.lm.forward import runs_plainly
from rlhf_bayes.lm.generation import generates_what_it_scores
from rlhf_bayes.lm.head import excluded_tokens
from rlhf_bayes.lm.model_inputs import RowInputs, collated, is_of_tokens
from rlhf_bayes.lm.probe import disagreement, evaluating, plain_logits, rounding

COLUMNS = ("images", "image")
"""The columns of a dataset that hold images, the first one that exists; TRL's names."""


def with_images_in_chat(row: Mapping[str, Any], insert: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """
    A row whose images, those of its columns too, stand in the messages of its prompt, and nowhere else.

    Args:
        row (`Mapping[str, Any]`):
            A row of a dataset: a prompt, and perhaps a column `images` or `image`.
        insert (`Callable`):
            Given messages and `images=`, the messages with the images in their places.

    Raises:
        ValueError: if a prompt with images is a text, or if it has parts that are neither text nor an image.
    """
    name = next((name for name in COLUMNS if name in row), None)
    value = row[name] if name is not None else None
    images = [] if value is None else [_decoded(image) for image in (value if name == "images" else [value])]
    prompt = row["prompt"]
    if isinstance(prompt, str):
        if images:
            raise ValueError(
                f"`prompt` must be a list of messages where the row has images in `{name}`, got the text {prompt!r}: "
                "where in it the images belong is not known. Pass `[{'role': 'user', 'content': text}]`."
            )
    else:
        prompt = [_as_made(message) for message in prompt]
        prompt = prompt if name is None else insert(prompt, images=images)
    images_of(prompt)  # refuses parts that it does not know
    return {column: value for column, value in row.items() if column not in COLUMNS} | {"prompt": prompt}


def _as_made(message: dict[str, Any]) -> dict[str, Any]:
    """A message as it was before a table stored it, with all keys in each part, and None in those that it had not."""
    if not isinstance(message.get("content"), list):
        return message
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    parts = [part | {"image": _decoded(part["image"])} if "image" in part else part for part in parts]
    return {**message, "content": parts}


def _decoded(image: Any) -> Any:
    # a table decodes images in columns of their own, and leaves those in messages as they were stored
    return Image().decode_example(image) if isinstance(image, dict) and "bytes" in image else image


def images_of(prompt: Any) -> list[Any]:
    """
    The images in the messages of a prompt, in order.

    Raises:
        ValueError: if a part is neither text nor an image, or an image is missing in its place.
    """
    parts = [part for message in _messages(prompt) for part in _parts(message)]
    for part in parts:
        if part.get("type") not in ("text", "image") or (part["type"] == "image" and "image" not in part):
            raise ValueError(
                f"`prompt` must hold parts of `type` 'text', or 'image' with the image itself as `image`, got "
                f"{part!r}. Load the image (`PIL.Image.open`), and leave out parts of other types."
            )
    return [part["image"] for part in parts if part["type"] == "image"]


def has_images(row: Mapping[str, Any]) -> bool:
    """Whether a row of a dataset has a column of images, or a chat with an image in it."""
    in_chat = any(part.get("type") == "image" for m in _messages(row.get("prompt")) for part in _parts(m))
    return in_chat or any(name in row for name in COLUMNS)


def _messages(prompt: Any) -> list[Any]:
    return prompt if isinstance(prompt, list) else []


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, list) else []


def row_inputs(fields: Mapping[str, Any], allowed: Sequence[str], processor: str) -> dict[str, Tensor]:
    """
    What a processor made of one prompt, besides its token ids, as tensors.

    Args:
        fields (`Mapping[str, Any]`):
            The processor's output for a batch of this one prompt.
        allowed (`Sequence[str]`):
            Names of the fields that may be passed to a model.
        processor (`str`):
            Name of the processor, for the error.

    Raises:
        ValueError: if there is a field of another name, which would have to be known to be cut and joined.
    """
    unknown = [name for name in fields if name not in allowed]
    if unknown:
        raise ValueError(
            f"`processing_class` must give inputs among {sorted(allowed)}, got {unknown} from {processor}: how these "
            "belong to the rows of a batch is not known. This model family is not supported yet."
        )
    return {
        name: torch.as_tensor(value[0] if is_of_tokens(name) else _as_array(value)) for name, value in fields.items()
    }


def _as_array(value: Any) -> Any:
    return value if isinstance(value, Tensor) else np.array(value)


def check_processor(processing_class: Any, model: nn.Module, use_vllm: bool, **datasets: Any) -> None:
    """
    Refuse images without a processor that reads them, and models and engines that cannot draw under images.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The trainer's.
        model (`nn.Module`):
            The policy, prepared by [`~rlhf_bayes.lm.enable_completion_scoring`].
        use_vllm (`bool`):
            Whether vLLM draws.
        **datasets:
            Datasets by the name of the trainer's argument: a dataset, a mapping of several, or None.

    Raises:
        ValueError: if there is such a case.
    """
    if isinstance(processing_class, ProcessorMixin):
        if use_vllm:
            raise ValueError(
                f"`use_vllm` must be False with a processor, got {type(processing_class).__name__}: vLLM could draw "
                "the token that stands for images, which the model cannot read in a completion. Leave it out, or pass "
                "the processor's `.tokenizer` for text-only data."
            )
        if runs_plainly(model):
            raise ValueError(
                f"{described(model)} must be trained with a tokenizer, got {type(processing_class).__name__}: padding "
                "or a cache changes what it computes, and images are read in padded batches only. Take LoRA on a "
                "model that knows masks and positions, or pass the processor's `.tokenizer` for text-only data."
            )
        return
    for name, dataset in datasets.items():
        for part in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
            if isinstance(part, Dataset | IterableDataset) and set(part.column_names or []) & set(COLUMNS):
                raise _needs_processor(f"`{name}` with the columns {list(part.column_names or [])}", processing_class)


def check_packs_text(padding_free: bool, processing_class: Any) -> None:
    """
    Refuse a processor where completions are scored without padding: images belong to rows of a batch.

    Raises:
        ValueError: if that is the case.
    """
    if padding_free and isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"`padding_free` must be False with a processor, got True with {type(processing_class).__name__}: images "
            "are read in padded batches only. Leave it out, or pass the processor's `.tokenizer` for text-only data."
        )


def check_rows_are_text(rows: Sequence[Mapping[str, Any]], processing_class: Any) -> None:
    """
    Refuse rows with images where the trainer has only a tokenizer.

    Raises:
        ValueError: if there is one.
    """
    if any(has_images(row) for row in rows):
        raise _needs_processor("a prompt with images", processing_class)


def _needs_processor(got: str, processing_class: Any) -> ValueError:
    return ValueError(
        f"`processing_class` must be the model's processor where prompts have images, got "
        f"{type(processing_class).__name__} and {got}: the images would not be read. Pass "
        "`AutoProcessor.from_pretrained(model_id)`, or drop or rename columns that hold no images of the prompt."
    )


@torch.no_grad()
def check_reads_images(
    model: nn.Module,
    sequences: tuple[Tensor, ...],
    token_log_probs: Tensor,
    model_inputs: Sequence[RowInputs],
    temperature: float,
) -> None:
    """
    Refuse a model whose scores in a padded batch, or whose draws with a cache, are not those of plain passes.

    Two rows of a rollout are compared, the one with the shortest and the one with the longest prompt among those with
    images.

    Args:
        model (`nn.Module`):
            The policy or the prior, with whole weights.
        sequences (`tuple[Tensor, ...]`):
            prompt_ids, prompt_mask (B, P), completion_ids, completion_mask (B, T).
        token_log_probs (`Tensor` (B, T)):
            Scores of the model, nats.
        model_inputs (`Sequence[RowInputs]`):
            Inputs of the B prompts besides their tokens.
        temperature (`float`):
            Divides the logits.

    Raises:
        ValueError: if they differ.
    """
    prompt_ids, prompt_mask, completion_ids, mask = sequences
    with_images = [
        row for row, inputs in enumerate(model_inputs) if not all(map(is_of_tokens, inputs)) and mask[row].any()
    ]
    by_length = sorted(with_images, key=lambda row: int(prompt_mask[row].sum()))
    chosen = list(dict.fromkeys([*by_length[:1], *by_length[-1:]]))
    if not chosen:
        return
    excluded = torch.tensor(excluded_tokens(base_causal_lm(model)), device=prompt_ids.device, dtype=torch.long)
    prompts = [prompt_ids[row][prompt_mask[row]] for row in chosen]
    with evaluating(model):
        for row, prompt in zip(chosen, prompts, strict=True):
            completion = completion_ids[row][mask[row]]
            others = collated([model_inputs[row]], [len(prompt)], len(prompt), len(completion), prompt_ids.device)
            logits = plain_logits(model, torch.cat([prompt, completion])[None], **others)[0, len(prompt) - 1 : -1]
            log_probs = (logits.float() / temperature).index_fill(-1, excluded, -torch.inf).log_softmax(-1)
            expected = log_probs.gather(-1, completion[:, None]).squeeze(-1)
            _check_equal(model, disagreement(token_log_probs[row][mask[row]], expected), "scores in a padded batch")
        inputs = [model_inputs[row] for row in chosen]
        alike = generates_what_it_scores(model, prompts, 3, rounding(model), inputs)
    _check_equal(model, 0.0 if alike else float("inf"), "draws with a cache")


def _check_equal(model: nn.Module, difference: float, what: str) -> None:
    if not difference <= rounding(model):
        raise ValueError(
            f"`model` ({described(model)}) must have one distribution over completions of a prompt with images, but "
            f"its {what} differ from plain passes of single rows by {difference:.3g} nats a token: weights and KLs "
            "would be wrong. This model family is not supported yet; please report it with its config."
        )
