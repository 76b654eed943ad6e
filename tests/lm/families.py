"""Tiny causal LMs of several families, random weights, and a tokenizer over letters. Not a test module."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnop"
SIZES = {
    "vocab_size": len(LETTERS) + 2,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "gpt2": {"vocab_size": SIZES["vocab_size"], "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "gemma2": SIZES | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": SIZES | {"logit_scale": 0.25},
    "granite": SIZES | {"logits_scaling": 3.0},
}
# whose log-probs change with left padding: they ignore the mask, or count positions from the first column
PADDING_MATTERS = {
    "rwkv": {"vocab_size": 18, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
    "bart": {"vocab_size": 18, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    | {"max_position_embeddings": 64},
}
# recurrent, hybrid and other families that take the mask and the positions
OTHERS = {
    "mamba": {"vocab_size": 18, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"]},
    "opt": {"vocab_size": 18, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2}
    | {"num_hidden_layers": 2, "max_position_embeddings": 64},
    "bloom": {"vocab_size": 18, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "qwen3_moe": SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
ALL = FAMILIES | PADDING_MATTERS | OTHERS


def tiny_tokenizer(chat: bool = False, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)} | {"<eos>": 16, "<pad>": 17}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="p"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<eos>|."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<eos>" if pad_is_eos else "<pad>",
        padding_side="left",
    )
    if chat:
        fast.chat_template = (
            "{% for message in messages %}a{{ message['content'] }}b{% endfor %}"
            "{% if add_generation_prompt %}c{% endif %}"
        )
    return fast


def tiny_model(family: str, seed: int = 0, spread: float = 8.0):
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**ALL[family], bos_token_id=None, eos_token_id=16, pad_token_id=17)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)  # random weights at the usual scale give a nearly uniform distribution
    return model.eval()
