"""Tiny vision-language models of several families, random weights, with processors that need PIL only. Not a test
module."""

from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

WORDS = ["what", "color", "is", "red", "blue", "cat", "user", "assistant"]
# contents may be a text or a list of parts, as in the templates of published models
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }} {% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE {% else %}{{ p['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
FAMILIES = ("qwen2_5_vl", "llava", "gemma3", "idefics3")


class QwenImages(transformers.Qwen2_5_VLProcessor):
    """Without the processor of videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    special = ("<pad>", "<eos>", "<unk>", *special)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=named,
    )


def _qwen2_5_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = tokenizer.convert_tokens_to_ids
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=256)
    template = _TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [0]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=_TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=vision | {"window_size": 16},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return QwenImages(images, tokenizer, template), transformers.Qwen2_5_VLForConditionalGeneration(config)


def _llava() -> tuple[Any, Any]:
    tokenizer, size = _tokenizer("<image>"), {"height": 8, "width": 8}
    processor = transformers.LlavaProcessor(
        LlavaImageProcessorPil(size=size, crop_size=size),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT, vocab_size=len(tokenizer)),
        vision_config=transformers.CLIPVisionConfig(**_VISION, projection_dim=8),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return processor, transformers.LlavaForConditionalGeneration(config)


def _gemma3() -> tuple[Any, Any]:
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(*names.values(), **names)
    ids = tokenizer.convert_tokens_to_ids
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 8, "width": 8}),
        tokenizer,
        image_seq_length=4,
        chat_template=_TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )
    config = transformers.Gemma3Config(
        text_config=_TEXT | {"vocab_size": len(tokenizer), "sliding_window": 8, "layer_types": ["sliding_attention"]},
        vision_config=transformers.SiglipVisionConfig(**_VISION),
        mm_tokens_per_image=4,
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
    )
    return processor, transformers.Gemma3ForConditionalGeneration(config)


def _idefics3() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    longest = {"longest_edge": 8}
    processor = transformers.Idefics3Processor(
        Idefics3ImageProcessorPil(size=longest, max_image_size=longest, do_image_splitting=False),
        tokenizer,
        image_seq_len=1,
        chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**_TEXT, vocab_size=len(tokenizer)),
        vision_config=dict(_VISION),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return processor, transformers.Idefics3ForConditionalGeneration(config)


def processor_and_model(family: str, seed: int = 0, spread: float = 4.0) -> tuple[Any, Any]:
    """A processor and a model; `spread` multiplies its matrices, so that images and words make a difference."""
    torch.manual_seed(seed)
    processor, model = {"qwen2_5_vl": _qwen2_5_vl, "llava": _llava, "gemma3": _gemma3, "idefics3": _idefics3}[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return processor, model.eval()


def plain_log_probs(model: Any, processor: Any, row: dict[str, Any], completion: torch.Tensor) -> torch.Tensor:
    """log π of each token of a completion (T,): see [`plain_distributions`]."""
    log_probs = plain_distributions(model, processor, row, completion)
    return log_probs.gather(-1, completion[:, None]).squeeze(-1)


def plain_distributions(model: Any, processor: Any, row: dict[str, Any], completion: torch.Tensor) -> torch.Tensor:
    """log π of every next token (T, V), from the model's own logits for this row alone, without padding."""
    content = [*({"type": "image", "image": image} for image in row["images"])]
    content.append({"type": "text", "text": row["prompt"][0]["content"]})
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    start = inputs["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            rest = {"input_ids": completion, "attention_mask": torch.ones_like(completion)}
            tail = rest.get(name, torch.zeros_like(completion))
            inputs[name] = torch.cat([inputs[name], tail[None]], dim=1)
    with torch.no_grad():
        logits = model(**inputs).logits[0, start - 1 : -1]  # (T, V)
    logits[:, model.config.image_token_id] = -torch.inf  # no completion holds it
    return logits.log_softmax(-1)


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def rows_of_several_images() -> list[dict[str, Any]]:
    """Two prompts that differ only in the image; one with three images, of other sizes; one without."""
    ask = [{"role": "user", "content": "what color"}]
    return [
        {"prompt": ask, "images": [picture(0)]},
        {"prompt": ask, "images": [picture(1)]},
        {
            "prompt": [{"role": "user", "content": "is red"}],
            "images": [picture(2, 16, 8), picture(3), picture(4, 8, 16)],
        },
        {"prompt": [{"role": "user", "content": "what is cat is blue"}], "images": []},
    ]


def dataset_of_images(column: str = "images") -> Dataset:
    """The rows as a dataset: images in a column `images` or `image`, or in the chats themselves."""
    rows = rows_of_several_images()
    if column == "image":
        rows = [{"prompt": row["prompt"], "image": row["images"][0]} for row in rows[:2]] * 2
    if column == "chat":
        rows = [
            {
                "prompt": [
                    {
                        "role": "user",
                        "content": [
                            *({"type": "image", "image": image, "text": None} for image in row["images"]),
                            {"type": "text", "text": row["prompt"][0]["content"], "image": None},
                        ],
                    }
                ]
            }
            for row in rows
        ]
    return Dataset.from_list(rows)
